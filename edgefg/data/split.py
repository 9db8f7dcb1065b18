"""Seeded splits into training, validation and test images, or into folds; stratified by class, groups kept whole."""

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
"""Label of an image of unknown class, which a student learns only from its teacher."""


class Sample(NamedTuple):
    """One labelled image."""

    path: Path
    label: int


def split_samples(
    samples: Sequence[Sample], root: Path, spec: SplitSpec, groups: Mapping[Path, str] | None = None
) -> dict[str, tuple[Sample, ...]]:
    """Split into ``train``, ``val`` and ``test``, stratified by class, with groups kept whole.

    Groups are assigned one by one, the largest first and in seeded order, each to the split that is furthest below its
    share of the group's classes (iterative stratification, Sechidis et al. 2011, applied to groups).

    Args:
        samples: labelled images.
        root: the data set's folder; `SplitSpec.group` is matched against paths relative to it.
        spec: how to split.
        groups: groups of the images, if the data set names them. An image without one is its own group.

    Raises:
        DataError: ``spec.group`` does not match a path, or is given in addition to ``groups``.
    """
    shares = {"train": 1.0 - spec.val - spec.test, "val": spec.val, "test": spec.test}
    return _assign(_group(samples, root, spec, groups), shares, spec.seed)


def split_folds(
    samples: Sequence[Sample], k: int, root: Path, spec: SplitSpec, groups: Mapping[Path, str] | None = None
) -> tuple[tuple[Sample, ...], ...]:
    """Split images into ``k`` folds for cross-validation, stratified by class, with groups kept whole.

    Args:
        samples: labelled images.
        k: number of folds, at least 2.
        root: the data set's folder.
        spec: its ``seed`` and ``group`` are used.
        groups: see `split_samples`.

    Raises:
        DataError: there are fewer groups than folds; or see `split_samples`.
    """
    members = _group(samples, root, spec, groups)
    if not 2 <= k <= len(members):
        raise DataError(
            f"cannot split {len(members)} groups of images into {k} folds; use at least 2, and at most one per group"
        )
    folds = _assign(members, {str(fold): 1.0 / k for fold in range(k)}, spec.seed, even=True)
    return tuple(folds.values())


def groups_across_splits(
    splits: Mapping[str, Sequence[Sample]], root: Path, spec: SplitSpec, groups: Mapping[Path, str] | None = None
) -> dict[str, list[str]]:
    """Return the groups with images in several splits, and these splits. Fixed splits may divide groups.

    Raises:
        DataError: see `split_samples`.
    """
    if spec.group is None and not groups:
        return {}
    splits_of: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, samples in splits.items():
        for key in _group(samples, root, spec, groups):
            splits_of[key].append(name)
    return {key[-1]: names for key, names in splits_of.items() if len(names) > 1}


def relative_name(path: Path, root: Path) -> str:
    """Return an image's name in a data set: its path relative to ``root``, or its whole path if it is not below."""
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def _group(
    samples: Sequence[Sample], root: Path, spec: SplitSpec, groups: Mapping[Path, str] | None
) -> dict[tuple[str, ...], list[Sample]]:
    """Collect the samples of each group. Keys of named groups cannot equal those of images without a group."""
    if groups and spec.group is not None:
        raise DataError(f"{root} names groups, and the pattern {spec.group!r} defines others; remove one of the two")
    members: dict[tuple[str, ...], list[Sample]] = defaultdict(list)
    for sample in samples:
        name = relative_name(sample.path, root)
        if groups and sample.path in groups:
            members[("group", groups[sample.path])].append(sample)
        else:
            members[(_group_of(name, spec.group),)].append(sample)
    return members


def _assign(
    groups: Mapping[tuple[str, ...], Sequence[Sample]], shares: Mapping[str, float], seed: int, *, even: bool = False
) -> dict[str, tuple[Sample, ...]]:
    """Assign groups to parts by their shares; ``even`` breaks ties in favour of the smaller part."""
    totals = Counter(sample.label for members in groups.values() for sample in members)
    missing = {part: {label: total * share for label, total in totals.items()} for part, share in shares.items()}
    assigned: dict[str, list[Sample]] = {part: [] for part in shares}
    # Ordered by hash, not shuffled: if every image is its own group, one image more or less leaves nearly all others
    # in their part. With larger groups it does not, because a group's size sets its turn, and everything after a group
    # whose size changed may move. Therefore `edgefg.data.dataset` compares fingerprints.
    for key in sorted(groups, key=lambda key: (-len(groups[key]), _hash(seed, "/".join(key)))):
        counts = Counter(sample.label for sample in groups[key])
        need = {part: sum(counts[c] * missing[part][c] / totals[c] for c in counts) for part in shares}
        if even:
            target = max(shares, key=lambda part: (round(need[part], 9), -len(assigned[part])))
        else:
            target = max(shares, key=need.__getitem__)
        assigned[target] += groups[key]
        for label, count in counts.items():
            missing[target][label] -= count
    return {part: tuple(sorted(members)) for part, members in assigned.items()}


def _hash(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}/{name}".encode()).digest()


def complete_splits(
    found: Mapping[str, Sequence[Sample]], root: Path, spec: SplitSpec, groups: Mapping[Path, str] | None = None
) -> dict[str, tuple[Sample, ...]]:
    """Return ``train``, ``val`` and ``test``; split the data, or ``train``, if some are missing.

    Args:
        found: samples by split, or all of them as ``all`` if the data set has no splits.
        root: the data set's folder.
        spec: how to split, and how much of ``train`` becomes ``val`` if there is none.
        groups: see `split_samples`.
    """
    if "all" in found:
        return split_samples(found["all"], root, spec, groups)
    if "val" in found:
        return {name: tuple(found.get(name, ())) for name in SPLITS}
    # Both parts become validation images: a data set with its own splits keeps its own test split.
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
        raise DataError(f"the group pattern {pattern!r} is not a regular expression: {exc}") from exc
    if match is None:
        raise DataError(f"the group pattern {pattern!r} does not match {path!r}; every image needs a group")
    return match[1] if match.re.groups else match[0]
