"""From checkpoint to artifact: distil, prune, quantise, emit, verify. Each folder states whether it needs torch."""
