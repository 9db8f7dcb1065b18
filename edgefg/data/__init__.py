"""Labelled images: index, folders, CSV manifests, public data sets, splits, boxes, duplicates. No torch.

`load_dataset` loads a whole data set and checks every image; `load_split` lists the images of one split.
"""

from edgefg.data.dataset import ImageDataset, load_dataset, load_split
from edgefg.data.split import Sample

__all__ = ["ImageDataset", "Sample", "load_dataset", "load_split"]
