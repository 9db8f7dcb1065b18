from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgefg.errors import DataError
from edgefg.split import SPLITS, Sample, SplitSpec, split_samples


def make(groups: list[tuple[int, int]]) -> list[Sample]:
    """One sample per (group, label), numbered."""
    return [Sample(Path(f"root/c{label}/g{group}-{i}.jpg"), label) for i, (group, label) in enumerate(groups)]


@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 3)), min_size=1, max_size=80),
    st.integers(0, 5),
)
def test_groups_stay_whole_and_nothing_is_lost(groups: list[tuple[int, int]], seed: int) -> None:
    samples = make(groups)
    spec = SplitSpec(seed=seed, group=r"/g(\d+)-")
    splits = split_samples(samples, Path("root"), spec)
    assert sorted(sample for part in SPLITS for sample in splits[part]) == sorted(samples)
    homes: dict[str, set[str]] = {}
    for part in SPLITS:
        for sample in splits[part]:
            homes.setdefault(sample.path.name.split("-")[0], set()).add(part)
    assert all(len(home) == 1 for home in homes.values())
    assert splits == split_samples(list(reversed(samples)), Path("root"), spec)


def test_every_class_gets_its_share_in_every_split() -> None:
    splits = split_samples(make([(i, i % 4) for i in range(400)]), Path("root"), SplitSpec())
    for label in range(4):
        counts = {part: sum(sample.label == label for sample in splits[part]) for part in SPLITS}
        assert counts == {"train": 70, "val": 15, "test": 15}


def test_the_seed_matters() -> None:
    samples = make([(i, i % 2) for i in range(60)])
    first, second = (split_samples(samples, Path("root"), SplitSpec(seed=seed)) for seed in (0, 1))
    assert first["val"] != second["val"]


def test_a_pattern_that_matches_nothing_names_the_image() -> None:
    with pytest.raises(DataError, match=r"matches nothing in 'c0/g0-0\.jpg'"):
        split_samples(make([(0, 0)]), Path("root"), SplitSpec(group=r"camera(\d)"))
