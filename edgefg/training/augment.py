"""Images as tensors: torchvision's augmentation for training, the project's one preprocessing for evaluation.

The random crop of training is resized by `edgefg.preprocess.resize` too, because a resize filter that differs between
training and device flips fine-grained labels by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset
from torchvision.transforms import v2

from edgefg.preprocess import InputSpec, prepare, resize
from edgefg.sources import read_image
from edgefg.split import Sample
from edgefg.training.recipe import Recipe

# Image → boxes of its parts, ``float32 [P, 4]``: x0, y0, x1, y1 in pixels of the file as decoded; NaN where absent.
Boxes = Mapping[Path, npt.NDArray[np.float32]]
Item = tuple[torch.Tensor, int, torch.Tensor | None, int]


class RandomResizedCrop(v2.RandomResizedCrop):  # type: ignore[misc]
    """torchvision's random crop, resized by the project's own filter; takes and gives ``uint8 [3, H, W]``."""

    def transform(self, inpt: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
        """Cut out and resize one image."""
        top, left = params["top"], params["left"]
        part = inpt[:, top : top + params["height"], left : left + params["width"]].permute(1, 2, 0).numpy()
        return torch.from_numpy(np.ascontiguousarray(resize(part, *self.size))).permute(2, 0, 1)


def training_transform(spec: InputSpec, *, min_area: float = 0.4) -> v2.Compose:
    """Build the geometric and colour augmentation of training, on ``uint8 [3, H, W]``."""
    return v2.Compose(
        [
            RandomResizedCrop((spec.height, spec.width), scale=(min_area, 1.0), ratio=(3 / 4, 4 / 3)),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(brightness=0.25, contrast=0.25, saturation=0.25),
        ]
    )


class TrainingImages(Dataset[Item]):
    """Augmented ``uint8 [H, W, 3]`` RGB images with their labels, part boxes (where there are any) and positions."""

    def __init__(
        self, samples: Sequence[Sample], spec: InputSpec, recipe: Recipe | None = None, boxes: Boxes | None = None
    ) -> None:
        self.samples = samples
        self._transform = training_transform(spec)
        self._boxes = boxes

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.samples)

    def __getitem__(self, index: int) -> Item:
        """Decode and augment one image."""
        path, label = self.samples[index]
        rgb = np.ascontiguousarray(read_image(path)[..., ::-1])
        image: torch.Tensor = self._transform(torch.from_numpy(rgb).permute(2, 0, 1))
        return image.permute(1, 2, 0).contiguous(), label, None, index


class EvaluationImages(Dataset[tuple[torch.Tensor, int]]):
    """``uint8 [H, W, 3]`` RGB images exactly as `edgefg.Classifier` prepares them, with their labels."""

    def __init__(self, samples: Sequence[Sample], spec: InputSpec) -> None:
        self._samples = samples
        self._spec = spec

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Decode and prepare one image."""
        path, label = self._samples[index]
        return torch.from_numpy(prepare(read_image(path), self._spec)), label
