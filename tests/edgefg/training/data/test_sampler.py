from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgefg.errors import DataError, TrainingError
from edgefg.preprocess import InputSpec
from edgefg.settings.training import MetricLearning
from edgefg.training.data.sampler import PKSampler, create_sampler

SPEC = InputSpec(height=32, width=32)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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
