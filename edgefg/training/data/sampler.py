"""Samplers: which images an epoch shows, if not each of them once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler, WeightedRandomSampler

from edgefg.errors import DataError, TrainingError
from edgefg.settings.training import MetricLearning


def create_sampler(
    labels: Sequence[int],
    settings: MetricLearning,
    *,
    batch_size: int,
    count: int,
    generator: torch.Generator,
) -> Sampler[int] | None:
    """Create the sampler of an epoch; None for ``shuffle``.

    ``balanced`` draws all classes equally often. It draws with replacement, since images of small classes must repeat.

    Args:
        labels: of all images.
        settings: ``sampler`` and ``per_class`` are used.
        batch_size: images per batch.
        count: images per epoch. ``pk`` shows as many whole batches as fit, and at least one.
        generator: source of all random numbers.

    Raises:
        TrainingError, DataError: see `PKSampler`.
    """
    if settings.sampler == "shuffle":
        return None
    if settings.sampler == "pk":
        batches = max(1, count // batch_size)
        return PKSampler(labels, batch_size, settings.per_class, batches=batches, generator=generator)
    weights = 1.0 / torch.bincount(torch.tensor(labels)).double()
    return WeightedRandomSampler(weights[list(labels)].tolist(), count, replacement=True, generator=generator)


class PKSampler(Sampler[int]):
    """Batches of P classes × K images (Hermans et al. 2017), where P = batch_size / K.

    All classes are drawn equally often. A class occurs once in a batch, and each of its images at most once, unless
    there are too few: then all occur before one repeats. The order within a batch is random. (The sampler of
    pytorch-metric-learning uses NumPy's global generator, whose state a resumed run does not restore.)

    Args:
        labels: of all images.
        batch_size: images per batch.
        per_class: K.
        batches: batches per epoch.
        generator: source of all random numbers.

    Raises:
        TrainingError: ``batch_size`` is not 2, 3, … times ``per_class``.
        DataError: there is only one class.
    """

    def __init__(
        self, labels: Sequence[int], batch_size: int, per_class: int, *, batches: int, generator: torch.Generator
    ) -> None:
        if batch_size % per_class or batch_size < 2 * per_class:
            raise TrainingError(
                f"a batch of {batch_size} images cannot hold two or more classes × {per_class} images. Use a"
                " --batch-size that is 2, 3, … times --per-class"
            )
        every = torch.tensor(labels)
        self._members = [torch.nonzero(every == label)[:, 0] for label in sorted(set(labels))]
        if len(self._members) < 2:
            raise DataError("all training images are of one class. --sampler pk needs at least two classes")
        self._shape = (batch_size // per_class, per_class)
        self._batches = batches
        self._generator = generator

    def __len__(self) -> int:
        """Return the number of images in an epoch."""
        return self._batches * self._shape[0] * self._shape[1]

    def __iter__(self) -> Iterator[int]:
        """Yield the positions of images, batch after batch."""
        classes, images = self._shape
        for _ in range(self._batches):
            groups = [self._members[index] for index in self._draw(len(self._members), classes).tolist()]
            batch = torch.cat([group[self._draw(len(group), images)] for group in groups])
            yield from batch[self._draw(len(batch), len(batch))].tolist()

    def _draw(self, available: int, wanted: int) -> torch.Tensor:
        """Draw ``wanted`` of 0 … available - 1. None repeats before all occurred."""
        rounds = -(-wanted // available)
        return torch.cat([torch.randperm(available, generator=self._generator) for _ in range(rounds)])[:wanted]
