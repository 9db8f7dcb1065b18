"""Which images an epoch shows, where it is not each of them once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler, WeightedRandomSampler

from edgefg.errors import DataError, TrainingError
from edgefg.settings.training import TrainingConfig


def sampler_of(
    labels: Sequence[int], config: TrainingConfig, *, count: int, generator: torch.Generator
) -> Sampler[int] | None:
    """Build the config's sampler; None for ``shuffle``.

    ``balanced`` draws each class alike often, with replacement, since its images then must repeat.

    Args:
        labels: of all images.
        config: its ``sampler``, ``batch_size`` and ``per_class`` are used.
        count: how many images an epoch shows; ``pk`` shows as many whole batches as fit, at least one.
        generator: the source of every draw.

    Raises:
        TrainingError, DataError: see `PKSampler`.
    """
    if config.metric_learning.sampler == "shuffle":
        return None
    if config.metric_learning.sampler == "pk":
        return PKSampler(
            labels,
            config.schedule.batch_size,
            config.metric_learning.per_class,
            batches=max(1, count // config.schedule.batch_size),
            generator=generator,
        )
    weights = 1.0 / torch.bincount(torch.tensor(labels)).double()
    return WeightedRandomSampler(weights[list(labels)].tolist(), count, replacement=True, generator=generator)


class PKSampler(Sampler[int]):
    """Batches of P classes × K images (Hermans et al. 2017), P = batch_size / K.

    Classes are drawn alike often. None is in a batch twice, and no image twice among the K of its class, unless there
    are too few of them; then all occur before one repeats. Within a batch the order is random. (The one of
    pytorch-metric-learning draws from NumPy's global generator, which a resumed run would not find as it was.)

    Args:
        labels: of all images.
        batch_size: images of a batch.
        per_class: K.
        batches: how many batches an epoch has.
        generator: the source of every draw.

    Raises:
        TrainingError: ``batch_size`` is not a multiple of ``per_class``, at least twice.
        DataError: there is only one class.
    """

    def __init__(
        self, labels: Sequence[int], batch_size: int, per_class: int, *, batches: int, generator: torch.Generator
    ) -> None:
        if batch_size % per_class or batch_size < 2 * per_class:
            raise TrainingError(
                f"a batch of {batch_size} images is not made of two or more classes × {per_class} images; needed a"
                " --batch-size that is 2, 3, … times --per-class"
            )
        every = torch.tensor(labels)
        self._members = [torch.nonzero(every == label)[:, 0] for label in sorted(set(labels))]
        if len(self._members) < 2:
            raise DataError("the training images are of one class; --sampler pk needs at least two")
        self._shape = (batch_size // per_class, per_class)
        self._batches = batches
        self._generator = generator

    def __len__(self) -> int:
        """Return the number of images in an epoch."""
        return self._batches * self._shape[0] * self._shape[1]

    def __iter__(self) -> Iterator[int]:
        """Yield positions, batch after batch."""
        classes, images = self._shape
        for _ in range(self._batches):
            groups = [self._members[index] for index in self._draw(len(self._members), classes).tolist()]
            batch = torch.cat([group[self._draw(len(group), images)] for group in groups])
            yield from batch[self._draw(len(batch), len(batch))].tolist()

    def _draw(self, available: int, wanted: int) -> torch.Tensor:
        """Draw ``wanted`` of 0 … available - 1; none repeats before all occurred."""
        rounds = -(-wanted // available)
        return torch.cat([torch.randperm(available, generator=self._generator) for _ in range(rounds)])[:wanted]
