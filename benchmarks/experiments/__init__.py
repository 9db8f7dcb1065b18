"""Experiments that chose this project's defaults. Not part of the wheel."""
