"""Calibration images: balanced, seeded, through the one preprocessing."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgefg.data.calibration import batches, choose_balanced, read_calibration, synthetic_frames
from edgefg.data.folders import read_folders
from edgefg.data.split import Sample
from edgefg.errors import DataError
from edgefg.image_io import read_image
from edgefg.preprocess import InputSpec, prepare


@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(1, 60), st.integers(0, 3))
def test_no_class_is_short_changed(sizes: list[int], count: int, seed: int) -> None:
    samples = [Sample(Path(f"{label}/{i}.jpg"), label) for label, size in enumerate(sizes) for i in range(size)]
    chosen = choose_balanced(samples, count, seed)
    assert len(chosen) == len(set(chosen)) == min(count, len(samples))
    counts = Counter(int(path.parent.name) for path in chosen)
    most = max(counts.values())
    assert all(counts[label] >= min(size, most - 1) for label, size in enumerate(sizes))
    assert chosen == choose_balanced(samples[::-1], count, seed)


CELLS = st.dictionaries(
    st.tuples(st.integers(0, 4), st.sampled_from(["", "day", "night infrared"])), st.integers(1, 9), min_size=1
)


@given(CELLS, st.integers(1, 60), st.integers(0, 3))
def test_no_condition_is_short_changed(sizes: dict[tuple[int, str], int], count: int, seed: int) -> None:
    """Conditions within a class keep the rule that classes keep, and classes keep theirs whatever the conditions."""
    cells = {Path(f"{label}/{name}/{i}"): (label, name) for (label, name), size in sizes.items() for i in range(size)}
    samples = [Sample(path, label) for path, (label, _) in cells.items()]
    conditions = {path: name for path, (_, name) in cells.items() if name}
    chosen = choose_balanced(samples, count, seed, conditions)
    assert len(chosen) == len(set(chosen)) == min(count, len(samples))
    assert chosen == choose_balanced(samples[::-1], count, seed, conditions)
    found = Counter(cells[path] for path in chosen)
    classes = Counter(cells[path][0] for path in chosen)
    for (label, name), size in sizes.items():
        most = max(found[other] for other in sizes if other[0] == label)
        assert found[label, name] >= min(size, most - 1)
        whole = sum(size for other, size in sizes.items() if other[0] == label)
        assert classes[label] >= min(whole, max(classes.values()) - 1)


def test_conditions_are_balanced_where_a_class_has_one_image_each() -> None:
    """One image of each of 200 classes, nine in ten by day: still both conditions, about as often."""
    cells = {Path(f"{label}/{i}"): "night" if i == 0 else "day" for label in range(200) for i in range(10)}
    samples = [Sample(path, int(path.parent.name)) for path in cells]
    found = Counter(cells[path] for path in choose_balanced(samples, 200, 0, cells))
    assert 70 <= found["night"] <= 130
    assert Counter(cells[path] for path in choose_balanced(samples, 200, 0))["night"] < 40


def test_without_conditions_an_earlier_choice_is_made_again() -> None:
    samples = [Sample(Path(f"{label}/{i}.jpg"), label) for label in range(2) for i in range(5)]
    names = [path.as_posix() for path in choose_balanced(samples, 4, 7)]
    assert names == ["0/4.jpg", "1/2.jpg", "0/0.jpg", "1/3.jpg"]


def test_seed_changes_the_choice() -> None:
    samples = [Sample(Path(f"{i}.jpg"), 0) for i in range(30)]
    assert choose_balanced(samples, 10, 0) != choose_balanced(samples, 10, 1)


def test_inputs_are_what_the_classifier_would_prepare(root: Path) -> None:
    spec = InputSpec(height=48, width=40)
    paths = choose_balanced(read_folders(root).splits["train"], 5)
    calibration = read_calibration(paths, spec)
    np.testing.assert_array_equal(calibration.inputs, np.stack([prepare(read_image(path), spec) for path in paths]))
    assert calibration.fingerprint == read_calibration(paths, spec).fingerprint
    assert calibration.fingerprint != read_calibration(paths[::-1], spec).fingerprint


def test_nothing_to_calibrate_with() -> None:
    with pytest.raises(DataError, match="cannot calibrate with 0 images; choose at least 1"):
        choose_balanced([Sample(Path("a.jpg"), 0)], 0)
    with pytest.raises(DataError, match="no calibration images"):
        read_calibration([], InputSpec(height=8, width=8))


def test_synthetic_frames_are_the_same_every_time_and_need_a_resize() -> None:
    spec = InputSpec(height=32, width=48)
    first, again = synthetic_frames(spec), synthetic_frames(spec)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert all(frame.dtype == np.uint8 and frame.shape[0] > 32 and frame.shape[1] > 48 for frame in first)
    assert len({frame.tobytes() for frame in first}) == len(first)


@pytest.mark.parametrize(("count", "size", "expected"), [(5, 2, 3), (4, 2, 2), (1, 3, 1)])
def test_batches_are_filled_up(count: int, size: int, expected: int) -> None:
    inputs = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    found = batches(inputs, size)
    assert len(found) == expected
    assert all(part.shape == (size, 2, 2, 3) and part.dtype == np.uint8 for part in found)
    np.testing.assert_array_equal(np.concatenate(found)[:count], inputs)
