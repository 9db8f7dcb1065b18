"""Deployment targets: one object per inference engine. Each needs its vendor's package; no torch."""
