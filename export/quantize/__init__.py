"""Post-training quantisation to INT8: calibrators, QDQ graphs, bias correction, mixed precision."""
