"""The course as pages to read: a map of the notebooks, a site that asks nobody, and slides."""
