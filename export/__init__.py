"""From checkpoint to artifact: distil, prune, quantise, emit, package, verify; one stage a file."""
