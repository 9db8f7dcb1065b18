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
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.transforms import v2

from edgefg.preprocess import InputSpec, prepare, resize
from edgefg.sources import read_image
from edgefg.split import Sample
from edgefg.training.models.network import Batch
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


def collate(items: Sequence[Item]) -> Batch:
    """Stack items of `TrainingImages`."""
    images, labels, boxes, indices = zip(*items, strict=True)
    stacked = None if boxes[0] is None else torch.stack(boxes)
    return Batch(torch.stack(images), torch.tensor(labels), boxes=stacked, indices=torch.tensor(indices))


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


def evaluation_loader(
    images: EvaluationImages, batch_size: int, *, workers: int
) -> DataLoader[tuple[torch.Tensor, int]]:
    """Build a loader that keeps the order."""
    return DataLoader(images, batch_size, num_workers=workers, worker_init_fn=_one_thread)


def training_loader(
    images: TrainingImages, recipe: Recipe, *, workers: int, seed: int, share: tuple[int, int] = (1, 0)
) -> DataLoader[Item]:
    """Build a loader of `Batch`es whose order and augmentation are those of ``seed``.

    ``share`` is (number of processes, this one's rank): each gets its part of every epoch. The last batch is dropped
    where it would hold a single image, which batch normalisation cannot take.
    """
    sampler: DistributedSampler[Item] | None = None
    if share[0] > 1:
        sampler = DistributedSampler(images, *share, shuffle=True, seed=seed)
    generator = torch.Generator()
    generator.manual_seed(seed)
    own = -(-len(images) // share[0])
    return DataLoader(
        images,
        recipe.batch_size,
        shuffle=sampler is None,
        sampler=sampler,
        num_workers=workers,
        generator=generator,
        drop_last=own % recipe.batch_size == 1 and own > recipe.batch_size,
        collate_fn=collate,
        worker_init_fn=_one_thread,
    )


def _one_thread(_: int) -> None:
    import cv2

    cv2.setNumThreads(0)
    torch.set_num_threads(1)
