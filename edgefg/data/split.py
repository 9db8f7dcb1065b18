"""Splitting images into train, validation and test, or into folds: by group, stratified by class, seeded."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from edgefg.errors import DataError
from edgefg.settings.split import SplitSpec

SPLITS = ("train", "val", "test")
UNLABELLED = -1
"""The label of an image of unknown class, which a student learns from its teacher alone."""


class Sample(NamedTuple):
    """One labelled image."""

    path: Path
    label: int


def split_samples(
    samples: Sequence[Sample], root: Path, spec: SplitSpec, groups: Mapping[Path, str] | None = None
) -> dict[str, tuple[Sample, ...]]:
    """Split into ``train``, ``val`` and ``test``, keeping groups whole and the classes' shares.

    Groups are dealt one by one, largest first and in seeded order, each to the split that lacks most of its classes'
    share (iterative stratification, Sechidis et al. 2011, for groups).

    Args:
        samples: labelled images.
        root: the data set's folder; what `SplitSpec.group` sees of a path begins below it.
        spec: how to split.
        groups: the images' groups where the data set itself names them; an image that is absent is a group of its own.

    Raises:
        DataError: ``spec.group`` does not fit a path, or both it and ``groups`` are given.
    """
    shares = {"train": 1.0 - spec.val - spec.test, "val": spec.val, "test": spec.test}
    return _deal(_grouped(samples, root, spec, groups), shares, spec.seed)


def folds(
    samples: Sequence[Sample], k: int, root: Path, spec: SplitSpec, groups: Mapping[Path, str] | None = None
) -> tuple[tuple[Sample, ...], ...]:
    """Deal the images into ``k`` parts for cross-validation, keeping groups whole and the classes' shares.

    Args:
        samples: labelled images.
        k: how many parts, at least 2.
        root: the data set's folder.
        spec: its ``seed`` and ``group`` are used.
        groups: see `split_samples`.

    Raises:
        DataError: there are fewer groups than parts, or see `split_samples`.
    """
    members = _grouped(samples, root, spec, groups)
    if not 2 <= k <= len(members):
        raise DataError(f"{len(members)} groups of images make no {k} folds; needed at least 2 folds and a group each")
    dealt = _deal(members, {str(part): 1.0 / k for part in range(k)}, spec.seed, even=True)
    return tuple(dealt.values())


def parted(
    splits: Mapping[str, Sequence[Sample]], root: Path, spec: SplitSpec, groups: Mapping[Path, str] | None = None
) -> dict[str, list[str]]:
    """Return the groups whose images lie in several splits, each with these splits: data may come split like that.

    Raises:
        DataError: see `split_samples`.
    """
    if spec.group is None and not groups:
        return {}
    homes: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, samples in splits.items():
        for key in _grouped(samples, root, spec, groups):
            homes[key].append(name)
    return {key[-1]: names for key, names in homes.items() if len(names) > 1}


def name_of(path: Path, root: Path) -> str:
    """Return an image's name in a data set: its path below ``root`` with slashes, or its whole path elsewhere."""
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def _grouped(
    samples: Sequence[Sample], root: Path, spec: SplitSpec, groups: Mapping[Path, str] | None
) -> dict[tuple[str, ...], list[Sample]]:
    """Collect the samples of each group. A group's key cannot be taken for the name of an image without group."""
    if groups and spec.group is not None:
        raise DataError(f"{root} names groups itself, and the pattern {spec.group!r} names others; leave one out")
    members: dict[tuple[str, ...], list[Sample]] = defaultdict(list)
    for sample in samples:
        name = name_of(sample.path, root)
        if groups and sample.path in groups:
            members[("group", groups[sample.path])].append(sample)
        else:
            members[(_group_of(name, spec.group),)].append(sample)
    return members


def _deal(
    groups: Mapping[tuple[str, ...], Sequence[Sample]], shares: Mapping[str, float], seed: int, *, even: bool = False
) -> dict[str, tuple[Sample, ...]]:
    """Deal groups to parts by their shares; ``even`` gives what two parts lack alike to the smaller one."""
    totals = Counter(sample.label for members in groups.values() for sample in members)
    lacking = {part: {label: total * share for label, total in totals.items()} for part, share in shares.items()}
    dealt: dict[str, list[Sample]] = {part: [] for part in shares}
    # Ordered by hash, not shuffled: where every image is a group of its own, one more or less leaves
    # nearly all others in their part. Not so where groups are larger: a group's size sets its turn, and whatever is
    # dealt after one whose size changed may go elsewhere. Hence the check of fingerprints in `edgefg.data.dataset`.
    for key in sorted(groups, key=lambda key: (-len(groups[key]), _hash(seed, "/".join(key)))):
        counts = Counter(sample.label for sample in groups[key])
        need = {part: sum(counts[c] * lacking[part][c] / totals[c] for c in counts) for part in shares}
        if even:
            target = max(shares, key=lambda part: (round(need[part], 9), -len(dealt[part])))
        else:
            target = max(shares, key=need.__getitem__)
        dealt[target] += groups[key]
        for label, count in counts.items():
            lacking[target][label] -= count
    return {part: tuple(sorted(members)) for part, members in dealt.items()}


def _hash(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}/{name}".encode()).digest()


def complete(
    found: Mapping[str, Sequence[Sample]], root: Path, spec: SplitSpec, groups: Mapping[Path, str] | None = None
) -> dict[str, tuple[Sample, ...]]:
    """Make ``train``, ``val`` and ``test`` of what a data set has.

    Args:
        found: samples by split, or all of them under ``all`` where the data set names no splits.
        root: the data set's folder.
        spec: how to split, and how much of ``train`` becomes ``val`` where that is absent.
        groups: see `split_samples`.
    """
    if "all" in found:
        return split_samples(found["all"], root, spec, groups)
    if "val" in found:
        return {name: tuple(found.get(name, ())) for name in SPLITS}
    # Both carved parts become validation: a test split is only ever the folder's own.
    halves = msgspec.structs.replace(spec, val=spec.val / 2, test=spec.val / 2)
    parts = split_samples(found["train"], root, halves, groups)
    return {
        "train": parts["train"],
        "val": tuple(sorted(parts["val"] + parts["test"])),
        "test": tuple(found.get("test", ())),
    }


def _group_of(path: str, pattern: str | None) -> str:
    if pattern is None:
        return path
    try:
        match = re.search(pattern, path)
    except re.error as exc:
        raise DataError(f"the group pattern {pattern!r} is no regular expression: {exc}") from exc
    if match is None:
        raise DataError(f"the group pattern {pattern!r} matches nothing in {path!r}; every image needs a group")
    return match[1] if match.re.groups else match[0]
