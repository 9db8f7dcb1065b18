from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgefg.data.split import (
    SPLITS,
    Sample,
    complete_splits,
    groups_across_splits,
    relative_name,
    split_folds,
    split_samples,
)
from edgefg.errors import DataError
from edgefg.settings.split import SplitSpec


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
    with pytest.raises(DataError, match=r"does not match 'c0/g0-0\.jpg'"):
        split_samples(make([(0, 0)]), Path("root"), SplitSpec(group=r"camera(\d)"))


def test_splits_do_not_change_from_version_to_version() -> None:
    """Checkpoints hold the rule, not the list: what was a test image must stay one."""
    samples = make([(i, i % 3) for i in range(30)])
    splits = split_samples(samples, Path("root"), SplitSpec(seed=1))
    assert {part: [sample.path.stem for sample in splits[part]] for part in ("val", "test")} == {
        "val": ["g18-18", "g21-21", "g1-1", "g13-13", "g23-23", "g8-8"],
        "test": ["g27-27", "g7-7", "g29-29"],
    }


def by_pair(samples: list[Sample]) -> dict[Path, str]:
    """Groups of images whose numbers are 2n and 2n + 1."""
    return {sample.path: f"lot {int(sample.path.stem.rpartition('-')[2]) // 2}" for sample in samples}


def test_groups_of_the_data_set_stay_whole() -> None:
    samples = make([(i, i // 20) for i in range(40)])
    groups = by_pair(samples)
    splits = split_samples(samples, Path("root"), SplitSpec(), groups)
    lots = [{groups[sample.path] for sample in splits[part]} for part in SPLITS]
    assert sum(map(len, lots)) == len(set.union(*lots)) == 20
    carved = complete_splits({"train": samples}, Path("root"), SplitSpec(val=0.3), groups)
    lots = [{groups[sample.path] for sample in carved[part]} for part in ("train", "val")]
    assert all(lots)
    assert not set.intersection(*lots)


def test_an_image_without_group_is_a_group_of_its_own() -> None:
    samples = make([(i, i % 2) for i in range(40)])
    some = {sample.path: "lot" for sample in samples[:10]}
    splits = split_samples(samples, Path("root"), SplitSpec(), some)
    assert len({part for part in SPLITS for sample in splits[part] if sample.path in some}) == 1
    assert all(splits[part] for part in SPLITS)


def test_a_pattern_and_groups_of_the_data_set() -> None:
    samples = make([(0, 0), (1, 1)])
    with pytest.raises(DataError, match="root names groups, and the pattern 'g' defines others; remove one of the two"):
        split_samples(samples, Path("root"), SplitSpec(group="g"), by_pair(samples))


@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 3)), min_size=1, max_size=80),
    st.integers(2, 5),
    st.integers(0, 5),
)
def test_folds_share_no_group_and_lose_nothing(groups: list[tuple[int, int]], k: int, seed: int) -> None:
    samples = make(groups)
    spec = SplitSpec(seed=seed, group=r"/g(\d+)-")
    if len({group for group, _ in groups}) < k:
        with pytest.raises(DataError, match=f"groups of images into {k} folds; use at least 2"):
            split_folds(samples, k, Path("root"), spec)
        return
    parts = split_folds(samples, k, Path("root"), spec)
    assert len(parts) == k
    assert sorted(sample for part in parts for sample in part) == sorted(samples)
    homes = [{sample.path.name.split("-")[0] for sample in part} for part in parts]
    assert sum(map(len, homes)) == len(set.union(*homes))
    assert parts == split_folds(list(reversed(samples)), k, Path("root"), spec)


def test_folds_are_even_and_have_every_class_s_share() -> None:
    parts = split_folds(make([(i, i % 4) for i in range(120)]), 3, Path("root"), SplitSpec())
    assert [[sum(sample.label == label for sample in part) for label in range(4)] for part in parts] == [[10] * 4] * 3
    # 25 classes of 4 images: what is left over when every fold has one must not all go to the first.
    parts = split_folds(make([(i, i % 25) for i in range(100)]), 3, Path("root"), SplitSpec())
    assert [len(part) for part in parts] == [34, 33, 33]
    samples = make([(i, i // 20) for i in range(40)])
    grouped = split_folds(samples, 4, Path("root"), SplitSpec(), by_pair(samples))
    assert [len(part) for part in grouped] == [10] * 4


def test_folds_depend_on_the_seed() -> None:
    samples = make([(i, i % 2) for i in range(60)])
    assert split_folds(samples, 3, Path("root"), SplitSpec(seed=0)) != split_folds(
        samples, 3, Path("root"), SplitSpec(seed=1)
    )
    with pytest.raises(DataError, match="60 groups of images into 1 folds; use at least 2"):
        split_folds(samples, 1, Path("root"), SplitSpec())


def test_names_are_relative_where_they_can_be() -> None:
    assert relative_name(Path("/data/a/b.jpg"), Path("/data")) == "a/b.jpg"
    assert relative_name(Path("/other/b.jpg"), Path("/data")) == "/other/b.jpg"


def test_groups_across_splits() -> None:
    samples = make([(0, 0), (0, 1), (1, 0), (2, 1)])
    splits = {"train": samples[:1] + samples[2:], "test": samples[1:2]}
    spec = SplitSpec(group=r"/g(\d+)-")
    assert groups_across_splits(splits, Path("root"), spec) == {"0": ["train", "test"]}
    assert groups_across_splits(splits, Path("root"), SplitSpec()) == {}
    named = {samples[0].path: "lot", samples[1].path: "lot"}
    assert groups_across_splits(splits, Path("root"), SplitSpec(), named) == {"lot": ["train", "test"]}
