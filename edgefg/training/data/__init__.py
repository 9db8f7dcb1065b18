"""Training data: augmentation, mixing, sampling and loading of batches. Needs torch."""
