"""Structured pruning of channels. Needs torch and torch-pruning."""
