"""What is kept: files, records, weights, assets."""
