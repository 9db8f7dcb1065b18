"""Splitting one folder of classes into train, validation and test: by group, stratified by class, seeded."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec

from edgefg.errors import DataError

SPLITS = ("train", "val", "test")


class SplitSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How data without split folders are split; stored in checkpoints, so that every stage splits alike."""

    seed: int = 0
    group: str | None = None
    """Regular expression; its first group (or whole match) in an image's path is its group: camera, patient, lot.

    Images of one group never part. None: every image is a group of its own.
    """
    val: Annotated[float, msgspec.Meta(gt=0, lt=0.5)] = 0.15
    test: Annotated[float, msgspec.Meta(gt=0, lt=0.5)] = 0.15


class Sample(NamedTuple):
    """One labelled image."""

    path: Path
    label: int


def split_samples(samples: Sequence[Sample], root: Path, spec: SplitSpec) -> dict[str, tuple[Sample, ...]]:
    """Split into ``train``, ``val`` and ``test``, keeping groups whole and the classes' shares.

    Groups are dealt one by one, largest first and in seeded order, each to the split that lacks most of its classes'
    share (iterative stratification, Sechidis et al. 2011, for groups).
    """
    groups: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[_group_of(sample.path.relative_to(root).as_posix(), spec.group)].append(sample)
    totals = Counter(sample.label for sample in samples)
    shares = {"train": 1.0 - spec.val - spec.test, "val": spec.val, "test": spec.test}
    lacking = {name: {label: total * share for label, total in totals.items()} for name, share in shares.items()}
    # Ordered by hash, not shuffled: one image more or less leaves nearly all others in their split.
    names = sorted(groups, key=lambda name: (-len(groups[name]), _hash(spec.seed, name)))
    dealt: dict[str, list[Sample]] = {name: [] for name in SPLITS}
    for name in names:
        counts = Counter(sample.label for sample in groups[name])
        target = max(SPLITS, key=lambda split: sum(counts[c] * lacking[split][c] / totals[c] for c in counts))
        dealt[target] += groups[name]
        for label, count in counts.items():
            lacking[target][label] -= count
    return {name: tuple(sorted(members)) for name, members in dealt.items()}


def _hash(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}/{name}".encode()).digest()


def complete(found: Mapping[str, Sequence[Sample]], root: Path, spec: SplitSpec) -> dict[str, tuple[Sample, ...]]:
    """Make ``train``, ``val`` and ``test`` of what a data set has.

    Args:
        found: samples by split folder, or all of them under ``all`` where there are no split folders.
        root: the data set's folder.
        spec: how to split, and how much of ``train`` becomes ``val`` where that is absent.
    """
    if "all" in found:
        return split_samples(found["all"], root, spec)
    if "val" in found:
        return {name: tuple(found.get(name, ())) for name in SPLITS}
    # Both carved parts become validation: a test split is only ever the folder's own.
    parts = split_samples(found["train"], root, msgspec.structs.replace(spec, val=spec.val / 2, test=spec.val / 2))
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
