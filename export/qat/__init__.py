"""Quantisation-aware training. Needs torch."""
