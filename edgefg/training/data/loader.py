"""Data loaders: how images become batches, in which order, and in how many processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.data import DataLoader, DistributedSampler

from edgefg.settings.training import TrainingConfig
from edgefg.training.allocator import release_freed_memory
from edgefg.training.data.augment import EvaluationImages, Item, TrainingImages
from edgefg.training.data.sampler import create_sampler
from edgefg.training.models.network import Batch


def collate(items: Sequence[Item]) -> Batch:
    """Stack items of `TrainingImages`."""
    images, labels, boxes, indices = zip(*items, strict=True)
    stacked = None if boxes[0] is None else torch.stack(boxes)
    return Batch(torch.stack(images), torch.tensor(labels), boxes=stacked, indices=torch.tensor(indices))


def evaluation_loader(
    images: EvaluationImages, batch_size: int, *, workers: int
) -> DataLoader[tuple[torch.Tensor, int]]:
    """Create a loader that keeps the order of the images."""
    _before_forking(workers)
    return DataLoader(images, batch_size, num_workers=workers, worker_init_fn=_one_thread)


def training_loader(
    images: TrainingImages, config: TrainingConfig, *, workers: int, seed: int, process: tuple[int, int] = (1, 0)
) -> DataLoader[Item]:
    """Create a loader of `Batch`es in random order.

    The last batch is dropped if it would be a single image, which batch normalisation does not support.

    Args:
        images: the images.
        config: batch size and sampler are used.
        workers: processes that load images.
        seed: of the order and the augmentation.
        process: number of training processes, and the rank of this one. Each process gets its part of every epoch, or
            draws as many images with a sampler that repeats images.

    Raises:
        TrainingError, DataError: see `edgefg.training.data.sampler.create_sampler`.
    """
    processes, rank = process
    own = -(-len(images) // processes)
    batch_size = config.schedule.batch_size
    generator = torch.Generator()
    generator.manual_seed(seed + 7919 * rank)
    labels = [sample.label for sample in images.samples]
    sampler = create_sampler(labels, config.metric_learning, batch_size=batch_size, count=own, generator=generator)
    if sampler is None and processes > 1:
        sampler = DistributedSampler(images, processes, rank, shuffle=True, seed=seed)
    _before_forking(workers)
    return DataLoader(
        images,
        batch_size,
        shuffle=sampler is None,
        sampler=sampler,
        num_workers=workers,
        generator=generator,
        drop_last=own % batch_size == 1 and own > batch_size,
        collate_fn=collate,
        worker_init_fn=_one_thread,
    )


def _before_forking(workers: int) -> None:
    if workers:
        release_freed_memory()


def _one_thread(_: int) -> None:
    import cv2

    cv2.setNumThreads(0)
    torch.set_num_threads(1)
