"""Images as tensors: torchvision's augmentation for training, the project's one preprocessing for evaluation.

The random crop of training is resized by `edgefg.preprocess.resize` too, because a resize filter that differs between
training and device flips fine-grained labels by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.transforms import v2

from edgefg.preprocess import InputSpec, prepare, resize
from edgefg.sources import read_image
from edgefg.split import Sample

Batch = tuple[torch.Tensor, torch.Tensor]


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


class TrainingImages(Dataset[tuple[torch.Tensor, int]]):
    """Augmented ``uint8 [H, W, 3]`` RGB images with their labels."""

    def __init__(self, samples: Sequence[Sample], spec: InputSpec) -> None:
        self._samples = samples
        self._transform = training_transform(spec)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Decode and augment one image."""
        path, label = self._samples[index]
        rgb = np.ascontiguousarray(read_image(path)[..., ::-1])
        image: torch.Tensor = self._transform(torch.from_numpy(rgb).permute(2, 0, 1))
        return image.permute(1, 2, 0).contiguous(), label


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


def loader(
    dataset: Dataset[tuple[torch.Tensor, int]],
    batch_size: int,
    *,
    workers: int,
    shuffle_seed: int | None = None,
    share: tuple[int, int] = (1, 0),
) -> DataLoader[tuple[torch.Tensor, int]]:
    """Build a loader; with ``shuffle_seed`` the order and the augmentation are those of that seed.

    ``share`` is (number of processes, this one's rank): each gets its part of every epoch. The last batch is dropped in
    training where it would hold a single image, which batch normalisation cannot take.
    """
    sampler: DistributedSampler[tuple[torch.Tensor, int]] | None = None
    if share[0] > 1:
        sampler = DistributedSampler(dataset, *share, shuffle=shuffle_seed is not None, seed=shuffle_seed or 0)
    generator = None
    if shuffle_seed is not None:
        generator = torch.Generator()
        generator.manual_seed(shuffle_seed)
    own = -(-len(dataset) // share[0])  # type: ignore[arg-type]
    lone = shuffle_seed is not None and own % batch_size == 1 and own > batch_size
    return DataLoader(
        dataset,
        batch_size,
        shuffle=shuffle_seed is not None and sampler is None,
        sampler=sampler,
        num_workers=workers,
        generator=generator,
        drop_last=lone,
        worker_init_fn=_one_thread,
        persistent_workers=False,
    )


def _one_thread(_: int) -> None:
    import cv2

    cv2.setNumThreads(0)
    torch.set_num_threads(1)
