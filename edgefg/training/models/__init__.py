"""Networks: one file per method. Needs torch and timm."""
