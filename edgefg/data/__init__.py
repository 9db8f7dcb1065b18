"""Labelled images: index, folders, CSV manifests, public data sets, splits, boxes, duplicates. No torch."""
