"""Training a pair of drafters for one's own target: text that the target writes, its features, two drafters."""
