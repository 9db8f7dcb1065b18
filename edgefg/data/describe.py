"""Summary of a data set: sizes, unreadable images, duplicates. Printed by `edgefg data`."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec

from edgefg.data.dataset import ImageDataset
from edgefg.data.duplicates import Duplicates, Pair, find_duplicates
from edgefg.data.index import count_by_suffix
from edgefg.data.split import SPLITS, relative_name

_MAX_LINES = 10


class SplitSize(msgspec.Struct, frozen=True, kw_only=True):
    """Size of a split."""

    images: int
    classes: int
    """Classes with an image in the split."""
    min_per_class: int
    """Images of the smallest of these classes."""
    median_per_class: float
    max_per_class: int
    groups: int | None
    """Groups with an image in the split; None if the data set names no groups."""


class DatasetSummary(msgspec.Struct, frozen=True, kw_only=True):
    """Summary of a data set."""

    data: str
    format: str
    fingerprint: str
    labels: tuple[str, ...]
    levels: tuple[str, ...]
    """Names of the coarser levels above the classes."""
    splits: dict[str, SplitSize]
    parts: tuple[str, ...]
    images_with_boxes: int
    unreadable: tuple[str, ...]
    ignored_files: dict[str, int]
    """Number of files in class folders that are not images, by suffix."""
    smallest_classes: tuple[tuple[str, int], ...]
    """Classes with the fewest training images, and their number."""
    duplicates: Duplicates | None
    """None if they were not searched for."""


def describe(name: str, data: ImageDataset, *, duplicates: bool = True) -> DatasetSummary:
    """Count a data set's images by split and class, and search for duplicates.

    Args:
        name: the data set's name in the summary.
        data: the data set.
        duplicates: whether to search for them, which decodes every image again and compares all pairs.
    """
    counts = Counter(sample.label for sample in data.splits["train"])
    smallest = sorted(range(len(data.labels)), key=lambda label: (counts[label], label))[:_MAX_LINES]
    return DatasetSummary(
        data=name,
        format=data.format,
        fingerprint=data.fingerprint,
        labels=data.labels,
        levels=tuple(level.name for level in data.taxonomy),
        splits={split: _size(data, split) for split in SPLITS if data.splits[split]},
        parts=data.parts,
        images_with_boxes=len(data.boxes or {}),
        unreadable=data.unreadable,
        ignored_files=data.ignored_files,
        smallest_classes=tuple((data.labels[label], counts[label]) for label in smallest),
        duplicates=find_duplicates(data.splits, data.digests) if duplicates else None,
    )


def render(summary: DatasetSummary, data: ImageDataset) -> str:
    """Format a summary of ``data`` as text."""
    levels = f", below {', '.join(summary.levels)}" if summary.levels else ""
    lines = [
        f"{summary.data}: format {summary.format}, {len(summary.labels)} classes{levels}",
        f"fingerprint {summary.fingerprint}",
        "",
        f"{'split':8}{'images':>8}{'classes':>9}{'groups':>8}   images per class: min, median, max",
    ]
    for split, size in summary.splits.items():
        groups = "–" if size.groups is None else size.groups
        lines.append(
            f"{split:8}{size.images:8}{size.classes:9}{groups:>8}   {size.min_per_class}, "
            f"{size.median_per_class:g}, {size.max_per_class}"
        )
    smallest = ", ".join(f"{label} {count}" for label, count in summary.smallest_classes)
    parts = f"{', '.join(summary.parts)} (boxes in {summary.images_with_boxes} images)" if summary.parts else "none"
    lines += ["", f"smallest classes in train: {smallest}", f"parts: {parts}"]
    lines += _listed("unreadable images", summary.unreadable)
    ignored = summary.ignored_files
    lines.append(f"ignored files: {f'{sum(ignored.values())} ({count_by_suffix(ignored)})' if ignored else 'none'}")
    if summary.duplicates is not None:
        duplicates = summary.duplicates
        lines += _listed("duplicates in two splits", [_line(pair, data) for pair in duplicates.across_splits])
        lines += _listed("duplicates with two labels", [_line(pair, data) for pair in duplicates.across_labels])
        within = ", ".join(f"{split} {count}" for split, count in duplicates.within_split.items() if count)
        lines.append(f"duplicates within one split and class: {within or 'none'}")
    return "\n".join(lines)


def _size(data: ImageDataset, split: str) -> SplitSize:
    samples = data.splits[split]
    counts = sorted(Counter(sample.label for sample in samples).values())
    return SplitSize(
        images=len(samples),
        classes=len(counts),
        min_per_class=counts[0],
        median_per_class=statistics.median(counts),
        max_per_class=counts[-1],
        groups=len({data.groups.get(path, path) for path, _ in samples}) if data.groups else None,
    )


def _listed(title: str, lines: Sequence[str]) -> list[str]:
    more = [f"  and {len(lines) - _MAX_LINES} more"] if len(lines) > _MAX_LINES else []
    return [f"{title}: {len(lines) or 'none'}", *(f"  {line}" for line in lines[:_MAX_LINES]), *more]


def _line(pair: Pair, data: ImageDataset) -> str:
    kind = (
        "identical files"
        if pair.exact
        else f"{'mirrored, ' if pair.mirrored else ''}correlation {pair.correlation:.3f}"
    )
    one, two = (
        f"{relative_name(Path(path), data.root)} ({split}, {data.labels[label]})"
        for path, split, label in zip((pair.first, pair.second), pair.splits, pair.labels, strict=True)
    )
    return f"{one} = {two}: {kind}"
