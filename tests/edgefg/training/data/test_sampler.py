from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgefg.data import load_dataset
from edgefg.errors import DataError, TrainingError
from edgefg.preprocess import InputSpec
from edgefg.settings.options import with_options
from edgefg.settings.training import MetricLearning, TrainingConfig
from edgefg.training.data.augment import TrainingImages
from edgefg.training.data.loader import training_loader
from edgefg.training.data.sampler import PKSampler, create_sampler

SPEC = InputSpec(height=32, width=32)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def of_three_classes(samples: tuple) -> list:
    """5, 10 and all images of the classes."""
    wanted, taken = {0: 5, 1: 10}, Counter[int]()
    kept = []
    for sample in samples:
        taken[sample.label] += 1
        if taken[sample.label] <= wanted.get(sample.label, 1000):
            kept.append(sample)
    return kept


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(0, 5), min_size=2, max_size=40).filter(lambda labels: len(set(labels)) > 1),
    classes=st.integers(2, 8),
    images=st.integers(2, 5),
    seed=st.integers(0, 1000),
)
def test_a_batch_is_p_classes_of_k_images(labels: list[int], classes: int, images: int, seed: int) -> None:
    sampler = PKSampler(labels, classes * images, images, batches=3, generator=generator(seed))
    drawn = list(sampler)
    assert len(drawn) == len(sampler) == 3 * classes * images
    sizes, distinct = Counter(labels), len(set(labels))
    for start in range(0, len(drawn), classes * images):
        batch = drawn[start : start + classes * images]
        counts = Counter(labels[position] for position in batch)
        groups = {label: count // images for label, count in counts.items()}
        assert all(count % images == 0 for count in counts.values())
        assert sum(groups.values()) == classes
        # Nothing repeats before everything occurred.
        assert max(groups.values()) == -(-classes // distinct)
        assert len(counts) == min(classes, distinct)
        for position, repeats in Counter(batch).items():
            label = labels[position]
            assert repeats <= groups[label] * -(-images // sizes[label])


def test_pk_draws_classes_alike_often_and_all_of_their_images() -> None:
    labels = [0] * 3 + [1] * 20 + [2] * 60
    drawn = list(PKSampler(labels, 8, 4, batches=300, generator=generator()))
    counts = np.bincount([labels[position] for position in drawn])
    np.testing.assert_allclose(counts / counts.sum(), 1 / 3, atol=0.04)
    assert set(drawn) == set(range(len(labels)))
    assert list(PKSampler(labels, 8, 4, batches=300, generator=generator())) == drawn
    # Shuffled within the batch: mixing takes neighbours, which must not all be of one class.
    assert len({labels[position] for position in drawn[:4]}) > 1 or len({labels[p] for p in drawn[8:12]}) > 1


@pytest.mark.parametrize(("batch_size", "per_class"), [(10, 4), (4, 4), (2, 4)])
def test_a_batch_that_does_not_divide_is_refused(batch_size: int, per_class: int) -> None:
    with pytest.raises(TrainingError, match=rf"a batch of {batch_size} images .* × {per_class} images\. Use"):
        PKSampler([0, 1], batch_size, per_class, batches=1, generator=generator())


def test_one_class_is_refused() -> None:
    with pytest.raises(DataError, match="are of one class"):
        PKSampler([3, 3, 3], 8, 4, batches=1, generator=generator())


def test_balanced_draws_each_class_alike_often() -> None:
    # Class 1 has no image: labels of a split need not be all of them.
    labels = [0] * 3 + [2] * 20 + [3] * 177
    sampler = create_sampler(
        labels, MetricLearning(sampler="balanced"), batch_size=8, count=6000, generator=generator()
    )
    assert sampler is not None
    counts = np.bincount([labels[position] for position in sampler])
    np.testing.assert_allclose(counts / 6000, [1 / 3, 0, 1 / 3, 1 / 3], atol=0.025)
    assert create_sampler(labels, MetricLearning(), batch_size=8, count=200, generator=generator()) is None


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
