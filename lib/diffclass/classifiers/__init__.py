"""Every kind of classifier: pixels in [0,1] and noise -> logits."""
