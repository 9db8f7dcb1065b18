"""Batches: how images are put together, in which order, by how many processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.data import DataLoader, DistributedSampler

from edgefg.settings.training import TrainingConfig
from edgefg.training.data.augment import EvaluationImages, Item, TrainingImages
from edgefg.training.data.sampler import sampler_of
from edgefg.training.loop.allocator import release_freed_memory
from edgefg.training.models.network import Batch


def collate(items: Sequence[Item]) -> Batch:
    """Stack items of `TrainingImages`."""
    images, labels, boxes, indices = zip(*items, strict=True)
    stacked = None if boxes[0] is None else torch.stack(boxes)
    return Batch(torch.stack(images), torch.tensor(labels), boxes=stacked, indices=torch.tensor(indices))


def evaluation_loader(
    images: EvaluationImages, batch_size: int, *, workers: int
) -> DataLoader[tuple[torch.Tensor, int]]:
    """Build a loader that keeps the order."""
    _before_forking(workers)
    return DataLoader(images, batch_size, num_workers=workers, worker_init_fn=_one_thread)


def training_loader(
    images: TrainingImages, config: TrainingConfig, *, workers: int, seed: int, share: tuple[int, int] = (1, 0)
) -> DataLoader[Item]:
    """Build a loader of `Batch`es whose order and augmentation are those of ``seed``.

    ``share`` is (number of processes, this one's rank): each gets its part of every epoch, or draws as many images by
    itself where the sampler repeats images anyway. The last batch is dropped where it would hold a single image, which
    batch normalisation cannot take.

    Raises:
        TrainingError, DataError: see `edgefg.training.data.sampler.sampler_of`.
    """
    processes, rank = share
    own = -(-len(images) // processes)
    generator = torch.Generator()
    generator.manual_seed(seed + 7919 * rank)
    labels = [sample.label for sample in images.samples]
    sampler = sampler_of(labels, config, count=own, generator=generator)
    if sampler is None and processes > 1:
        sampler = DistributedSampler(images, processes, rank, shuffle=True, seed=seed)
    _before_forking(workers)
    return DataLoader(
        images,
        config.schedule.batch_size,
        shuffle=sampler is None,
        sampler=sampler,
        num_workers=workers,
        generator=generator,
        drop_last=own % config.schedule.batch_size == 1 and own > config.schedule.batch_size,
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
