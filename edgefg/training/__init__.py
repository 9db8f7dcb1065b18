"""Training: data, networks, the loop, checkpoints. Needs the extra ``edgefg[train]``."""
