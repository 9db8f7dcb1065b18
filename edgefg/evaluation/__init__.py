"""Running models over images, comparing them, and packaging and verifying artifacts. No torch."""
