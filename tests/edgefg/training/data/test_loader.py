from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from edgefg.data import load_dataset
from edgefg.data.split import Sample
from edgefg.preprocess import InputSpec
from edgefg.settings.options import with_options
from edgefg.settings.training import TrainingConfig
from edgefg.training.data.augment import EvaluationImages, TrainingImages
from edgefg.training.data.loader import collate, evaluation_loader, training_loader

SPEC = InputSpec(height=32, width=32)


def test_items_are_stacked() -> None:
    items = [(torch.full((2, 2, 3), n, dtype=torch.uint8), n, torch.full((1, 4), float(n)), 10 + n) for n in range(3)]
    batch = collate(items)
    assert batch.images.shape == (3, 2, 2, 3)
    assert batch.labels.tolist() == [0, 1, 2]
    assert batch.boxes is not None
    assert batch.boxes.shape == (3, 1, 4)
    assert batch.indices is not None
    assert batch.indices.tolist() == [10, 11, 12]
    assert collate([(image, label, None, index) for image, label, _, index in items]).boxes is None


def test_evaluation_keeps_the_order(birds: Path) -> None:
    samples = load_dataset(birds).splits["val"]
    images = EvaluationImages(samples, SPEC)
    batches = list(evaluation_loader(images, 4, workers=0))
    assert torch.equal(torch.cat([own for own, _ in batches]), torch.stack([images[i][0] for i in range(len(images))]))
    assert torch.cat([labels for _, labels in batches]).tolist() == [sample.label for sample in samples]


def of_three_classes(samples: tuple[Sample, ...]) -> list[Sample]:
    """5, 10 and all images of the classes."""
    wanted, taken = {0: 5, 1: 10}, Counter[int]()
    kept = []
    for sample in samples:
        taken[sample.label] += 1
        if taken[sample.label] <= wanted.get(sample.label, 1000):
            kept.append(sample)
    return kept


@pytest.mark.parametrize("sampler", ["balanced", "pk", "shuffle"])
def test_the_loader_s_epoch_is_seeded_and_has_its_length(birds: Path, sampler: str) -> None:
    samples = of_three_classes(load_dataset(birds).splits["train"])
    images = TrainingImages(samples, SPEC)
    settings = with_options(TrainingConfig(), sampler=sampler, batch_size=8)

    def epoch(seed: int, process: tuple[int, int] = (1, 0)) -> list[list[int]]:
        loader = training_loader(images, settings, workers=0, seed=seed, process=process)
        found = [batch.indices.tolist() for batch in loader]
        assert len(found) == len(loader)
        return found

    first = epoch(7)
    assert epoch(7) == first
    assert epoch(8) != first
    shown = sum(map(len, first))
    # 33 images: one more than fits is dropped, since a batch of one cannot be normalised.
    assert len(samples) == 33
    assert shown == 32
    labels = Counter(samples[index].label for batch in first for index in batch)
    if sampler == "pk":
        assert all(sorted(Counter(samples[index].label for index in batch).values()) == [4, 4] for batch in first)
    if sampler == "balanced":
        assert labels[0] > 5  # as many as there are, were each shown once

    halves = [epoch(7, (2, 0)), epoch(7, (2, 1))]
    assert halves[0] != halves[1]
    assert len(halves[0]) == len(halves[1])
    if sampler == "shuffle":
        assert {index for half in halves for batch in half for index in batch} >= set(range(32))
