"""Labelled images of a data set, without torch: what `verify`, `evaluate` and `bench` measure on."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from edgefg.data import dataset
from edgefg.data.cub import is_cub, read_cub
from edgefg.data.index import Listing, is_csv, read_csv
from edgefg.data.split import SPLITS, Sample
from edgefg.errors import DataError
from edgefg.image_io import image_files
from edgefg.settings.split import SplitSpec

PUBLIC = ("fgvc-aircraft", "stanford-cars", "oxford-pets", "flowers-102", "inaturalist")
"""Public data sets that torchvision reads, given as ``NAME:ROOT``."""
# What stands before the name is left by `Path.resolve`; a relative root is then relative to it.
_PUBLIC_ROOT = re.compile(rf"^(?P<base>(?:.*/)?)(?P<name>{'|'.join(PUBLIC)}):(?P<rest>.+)$")

_MEANT = {
    **{"train": "train", "training": "train"},
    **{"val": "val", "valid": "val", "validation": "val"},
    **{"test": "test", "testing": "test"},
}
_NEEDED = "needed DATA/<split>/<class>/*.jpg, DATA/<class>/*.jpg, a CSV manifest or CUB's folder"
_REMEDY = "restore it, or give images that are new to the artifact as DATA/test/<class>/*.jpg"


def public_root(data: Path) -> tuple[str, Path] | None:
    """Take ``NAME:ROOT`` apart, a path as it may be; None where it names no public data set."""
    match = _PUBLIC_ROOT.match(data.as_posix())
    return (match["name"], Path(match["base"]) / match["rest"]) if match and not data.exists() else None


def read_listing(data: Path) -> Listing | None:
    """Read what lists its images itself, a CSV manifest or CUB's files; None for class folders. Raises `DataError`."""
    if is_csv(data):
        return read_csv(data)
    return read_cub(data) if is_cub(data) else None


def read_images(
    listing: Listing, *, skip_corrupt: bool, watch: dataset.Watch = dataset.unwatched
) -> tuple[dict[Path, str], dict[Path, str]]:
    """Read every image of a data set; return what is wrong by path, and the SHA-256 of the readable ones by path.

    Args:
        listing: the data set.
        skip_corrupt: name unreadable images on standard error instead of raising.
        watch: see `edgefg.data.dataset.check_images`.

    Raises:
        DataError: an image cannot be read.
    """
    paths = [sample.path for members in listing.found.values() for sample in members]
    bad, digests = dataset.check_images(listing.root, paths, watch)
    if bad and not skip_corrupt:
        raise DataError(corrupt_message(list(bad.values()), len(paths)))
    for problem in bad.values():
        print(f"left out: {problem}", file=sys.stderr)
    return bad, digests


def read_split(
    data: Path,
    split: str | None,
    labels: Sequence[str],
    spec: SplitSpec | None,
    *,
    prefer: Sequence[str] = ("test", "val"),
    trained_on: str | None = None,
    skip_corrupt: bool = False,
) -> tuple[str, tuple[Sample, ...]]:
    """List the images of one split with their class indices; return the split's name and the samples.

    Args:
        data: ``DATA/{train,val,test}/<class>/*.jpg``, ``DATA/<class>/*.jpg``, a CSV manifest (see `edgefg.data.index`),
            or the folder of CUB-200-2011.
        split: None takes the first of ``prefer`` that there is.
        labels: the artifact's class names in order; the data's classes are matched by name.
        spec: how training split data without splits, from the artifact's manifest. None takes such data whole, under
            the name ``all``.
        prefer: what ``split=None`` stands for.
        trained_on: fingerprint of the data that the artifact was trained on, from its manifest. Where the split is made
            here, the data must be the very same, since another image could move training images into the test split.
        skip_corrupt: where the split is made here, leave unreadable images out of it, as training did, and say so on
            standard error, instead of raising. A split that the data have themselves is listed without a look into it.

    Raises:
        DataError: the split is missing or empty, a class is not among the labels, or where the split is made here, an
            image cannot be read or the data are not ``trained_on``.
    """
    present, members, listing = _members(data, labels)
    if not present and spec is None:
        if split is not None:
            raise DataError(f"{data} has no splits; needed {split}/: leave --split out to take all of it")
        return "all", members("all")
    carved = bool(spec) and (not present or ("val" not in present and "train" in present))
    offered = [*SPLITS] if not present else [name for name in SPLITS if name in present or (name == "val" and carved)]
    name = split or next((name for name in prefer if name in offered), "")
    if name not in offered:
        wanted = f"needed {split}/" if split else f"needed {' or '.join(prefer)}; or say --split train"
        raise DataError(f"{data} has the splits {', '.join(offered)}; {wanted}")
    if name in present and not (carved and name == "train"):
        return name, members(name)
    assert spec is not None  # carved
    found = {part: members(part) for part in present or ["all"]}
    listing = listing or Listing(format="folders", root=data, labels=tuple(labels), found=found)
    listing = msgspec.structs.replace(listing, found=found)
    _, digests = read_images(listing, skip_corrupt=skip_corrupt)
    dealt = dataset.deal(listing, digests, spec)
    if trained_on is not None:
        dataset.need_same(data, dealt.fingerprint, trained_on, "artifact", _REMEDY)
    samples = dealt.splits[name]
    if not samples:
        raise DataError(f"{data} is too small: its {name} split is empty; add images")
    return name, samples


def _members(
    data: Path, labels: Sequence[str]
) -> tuple[list[str], Callable[[str], tuple[Sample, ...]], Listing | None]:
    """Return the splits that the data themselves have, what lists one of them (or ``all``), and their listing."""
    if public := public_root(data):
        raise DataError(
            f"{data}: {public[0]} in its own files is read where edgefg[train] is installed only; write a CSV manifest"
            f" there (edgefg data {data} --csv {public[0]}.csv) and give that"
        )
    listing = read_listing(data)
    if listing is not None:
        present = [part for part in SPLITS if part in listing.found]
        return present, lambda part: _relabelled(data, listing, part, labels), listing
    if not data.is_dir():
        raise DataError(f"{data} is not a folder; {_NEEDED}")
    present = split_folders(data)
    return present, lambda part: class_samples(data if part == "all" else data / part, labels), None


def _relabelled(data: Path, listing: Listing, part: str, labels: Sequence[str]) -> tuple[Sample, ...]:
    """Give the samples of one split of a listing the class indices of ``labels``."""
    index = {name: i for i, name in enumerate(labels)}
    samples = listing.found[part]
    used = sorted({label for _, label in samples})
    _need_known(data, "classes", [listing.labels[label] for label in used], labels)
    return tuple(Sample(path, index[listing.labels[label]]) for path, label in samples)


def class_samples(folder: Path, labels: Sequence[str]) -> tuple[Sample, ...]:
    """List the images below the class folders of ``folder``, sorted by class folder and path. Raises `DataError`."""
    index = {name: i for i, name in enumerate(labels)}
    classes = class_folders(folder)
    if not classes:
        raise DataError(f"{folder} holds no class folder; needed one folder of images a class")
    _need_known(folder, "class folders", [entry.name for entry in classes], labels)
    return tuple(Sample(path, index[entry.name]) for entry in classes for path in image_files(entry))


def _need_known(data: Path, what: str, names: Sequence[str], labels: Sequence[str]) -> None:
    """Raise `DataError` unless the data's class names are among the artifact's labels."""
    known = set(labels)
    if unknown := [name for name in names if name not in known]:
        raise DataError(
            f"{data} has {len(unknown)} {what} that the artifact does not know (first: {unknown[0]!r};"
            f" its {len(labels)} labels begin with {labels[0]!r}); use the data set that it was made from"
        )


def split_folders(data: Path) -> list[str]:
    """List those of `edgefg.data.split.SPLITS` that are folders in ``data``.

    Raises:
        DataError: it cannot be looked into, or holds a folder like ``Test`` or ``valid``, which means a split and would
            be taken for a class, or passed over beside other splits.
    """
    names = [entry.name for entry in class_folders(data)]
    for name in names:
        if (meant := _MEANT.get(name.lower(), name)) != name:
            raise DataError(f"{data} has {name}/ where edgefg reads {meant}/; rename it, or move it elsewhere")
    return [name for name in SPLITS if name in names]


def class_folders(folder: Path) -> list[Path]:
    """List the folders in ``folder``, sorted, hidden ones left out. Raises `DataError` where it cannot be read."""
    try:
        return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError as exc:
        raise DataError(f"cannot look into {folder}: {exc.strerror}") from exc


def corrupt_message(problems: Sequence[str], total: int) -> str:
    """Say in one line how many images of how many cannot be used, and name the first three."""
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return (
        f"{len(problems)} of {total} images cannot be used: {'; '.join(problems[:3])}{more};"
        " repair or remove them, or leave them out with --skip-corrupt"
    )
