"""Training of teachers and students. Needs torch and timm: the extra ``edgefg[train]``."""
