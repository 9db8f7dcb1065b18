"""What a data set holds and what is wrong with it: `edgefg data`."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec

from edgefg.data.duplicates import Duplicates, Pair, find_duplicates
from edgefg.data.load import FolderData, kinds_of
from edgefg.data.split import SPLITS, name_of

_SHOWN = 10


class SplitSize(msgspec.Struct, frozen=True, kw_only=True):
    """How large a split is."""

    images: int
    classes: int
    """Classes with an image here."""
    least: int
    """Images of the smallest class that is here."""
    median: float
    most: int
    groups: int | None
    """Groups with an image here; None where the data set names none."""


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """What a data set holds."""

    data: str
    format: str
    fingerprint: str
    labels: tuple[str, ...]
    levels: tuple[str, ...]
    """Names of the coarser levels above the classes."""
    splits: dict[str, SplitSize]
    parts: tuple[str, ...]
    boxed: int
    """Images with a box."""
    unreadable: tuple[str, ...]
    unread: dict[str, int]
    """How many files in class folders have a suffix that is not read as an image, by suffix."""
    smallest: tuple[tuple[str, int], ...]
    """The classes with the fewest training images, and how many."""
    duplicates: Duplicates | None
    """None where they were not looked for."""


def describe(name: str, data: FolderData, *, duplicates: bool = True) -> Description:
    """Count a data set's images by split and class, and look for pictures that it has twice.

    Args:
        name: what to call it.
        data: the checked data set.
        duplicates: whether to look for them, which decodes every image once more and compares each with each.
    """
    counts = Counter(sample.label for sample in data.splits["train"])
    smallest = sorted(range(len(data.labels)), key=lambda label: (counts[label], label))[:_SHOWN]
    return Description(
        data=name,
        format=data.format,
        fingerprint=data.fingerprint,
        labels=data.labels,
        levels=tuple(level.name for level in data.taxonomy),
        splits={split: _size(data, split) for split in SPLITS if data.splits[split]},
        parts=data.parts,
        boxed=len(data.boxes or {}),
        unreadable=data.skipped,
        unread=data.unread,
        smallest=tuple((data.labels[label], counts[label]) for label in smallest),
        duplicates=find_duplicates(data.splits, data.digests) if duplicates else None,
    )


def render(found: Description, data: FolderData) -> str:
    """Write a description for a person; ``data`` gives the images their names."""
    levels = f", below {', '.join(found.levels)}" if found.levels else ""
    lines = [
        f"{found.data}: format {found.format}, {len(found.labels)} classes{levels}",
        f"fingerprint {found.fingerprint}",
        "",
        f"{'split':8}{'images':>8}{'classes':>9}{'groups':>8}   a class: least, median, most",
    ]
    for split, size in found.splits.items():
        groups = "–" if size.groups is None else size.groups
        lines.append(
            f"{split:8}{size.images:8}{size.classes:9}{groups:>8}   {size.least}, {size.median:g}, {size.most}"
        )
    lines += ["", f"smallest in train: {', '.join(f'{label} {count}' for label, count in found.smallest)}"]
    lines.append(f"parts: {', '.join(found.parts)} (boxes in {found.boxed} images)" if found.parts else "parts: none")
    lines += _listed("unreadable images", found.unreadable)
    kinds = f"{sum(found.unread.values())} ({kinds_of(found.unread)})" if found.unread else "none"
    lines.append(f"files of other kinds: {kinds}")
    if found.duplicates is not None:
        twice = found.duplicates
        lines += _listed("pictures in two splits", [_line(pair, data) for pair in twice.across])
        lines += _listed("pictures under two labels", [_line(pair, data) for pair in twice.relabelled])
        within = ", ".join(f"{split} {count}" for split, count in twice.within.items() if count)
        lines.append(f"pictures twice within one split and class: {within or 'none'}")
    return "\n".join(lines)


def _size(data: FolderData, split: str) -> SplitSize:
    samples = data.splits[split]
    counts = sorted(Counter(sample.label for sample in samples).values())
    return SplitSize(
        images=len(samples),
        classes=len(counts),
        least=counts[0],
        median=statistics.median(counts),
        most=counts[-1],
        groups=len({data.groups.get(path, path) for path, _ in samples}) if data.groups else None,
    )


def _listed(title: str, lines: Sequence[str]) -> list[str]:
    more = [f"  and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return [f"{title}: {len(lines) or 'none'}", *(f"  {line}" for line in lines[:_SHOWN]), *more]


def _line(pair: Pair, data: FolderData) -> str:
    kind = "same file" if pair.exact else f"{'mirrored, ' if pair.flipped else ''}correlation {pair.correlation:.3f}"
    one, two = (
        f"{name_of(Path(path), data.root)} ({split}, {data.labels[label]})"
        for path, split, label in zip((pair.first, pair.second), pair.splits, pair.labels, strict=True)
    )
    return f"{one} = {two}: {kind}"
