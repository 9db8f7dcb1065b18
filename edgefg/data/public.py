"""Public fine-grained data sets, read by torchvision: ``NAME:ROOT``. Nothing is downloaded.

- ``fgvc-aircraft:ROOT``: 100 variants, official train, val and test;
- ``stanford-cars:ROOT``: 196 models, official train and test;
- ``oxford-pets:ROOT``: 37 breeds, official trainval and test;
- ``flowers-102:ROOT``: official train, val and test;
- ``inaturalist:ROOT`` or ``inaturalist:VERSION:ROOT``. Versions ``2021_train`` (the default) and ``2021_train_mini``:
  training images; ``2021_valid``, if it is in ROOT too, is test, as in published figures, since the official test
  labels are not public. Versions ``2017``, ``2018``, ``2019`` and ``2021_valid``: edgefg splits the images.

Without an official val, a part of the training images is used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgefg.data.index import DatasetIndex
from edgefg.data.split import Sample
from edgefg.errors import DataError, one_line
from edgefg.image_io import IMAGE_SUFFIXES
from edgefg.taxonomy import TaxonomyLevel

PUBLIC = ("fgvc-aircraft", "stanford-cars", "oxford-pets", "flowers-102", "inaturalist")
"""Names of the public data sets."""
_INAT_VERSIONS = ("2017", "2018", "2019", "2021_train", "2021_train_mini", "2021_valid")
# `Path.resolve` puts a folder before the name; a relative root is then relative to that folder.
_PUBLIC_ROOT = re.compile(rf"^(?P<base>(?:.*/)?)(?P<name>{'|'.join(PUBLIC)}):(?P<rest>.+)$")


def public_root(data: Path) -> tuple[str, Path] | None:
    """Split ``NAME:ROOT``, also as a resolved path, into name and root; None if it is not a public data set."""
    match = _PUBLIC_ROOT.match(data.as_posix())
    return (match["name"], Path(match["base"]) / match["rest"]) if match and not data.exists() else None


def read_public(name: str, root: Path) -> DatasetIndex:
    """List the images of a public data set.

    Args:
        name: one of `PUBLIC`.
        root: folder that torchvision would download it to; for iNaturalist, ``VERSION:ROOT`` too.

    Raises:
        DataError: files are missing, or torchvision is missing or cannot read them.
    """
    if name == "inaturalist":
        return _inaturalist(root)
    read, needed = _READERS[name]
    try:
        labels, found, taxonomy = read(root)
    except (ImportError, RuntimeError, OSError, ValueError, LookupError, TypeError) as exc:
        raise _missing(name, root, needed, exc) from exc
    return _index(name, root, labels, found, taxonomy)


_Found = tuple[Sequence[str], dict[str, list[tuple[Any, int]]], tuple[TaxonomyLevel, ...]]


def _aircraft(root: Path) -> _Found:
    from torchvision.datasets import FGVCAircraft

    parts = {split: FGVCAircraft(root, split=split) for split in ("train", "val", "test")}
    found = {split: list(zip(part._image_files, part._labels, strict=True)) for split, part in parts.items()}
    levels = []
    for level in ("family", "manufacturer"):
        coarse = FGVCAircraft(root, split="train", annotation_level=level)
        group = dict(zip(parts["train"]._labels, coarse._labels, strict=True))
        names = parts["train"].classes
        levels.append(TaxonomyLevel(name=level, groups=tuple(coarse.classes[group[i]] for i in range(len(names)))))
    return parts["train"].classes, found, tuple(levels)


def _cars(root: Path) -> _Found:
    from torchvision.datasets import StanfordCars

    parts = {split: StanfordCars(root, split=split) for split in ("train", "test")}
    return parts["train"].classes, {split: part._samples for split, part in parts.items()}, ()


def _pets(root: Path) -> _Found:
    from torchvision.datasets import OxfordIIITPet

    parts = {"train": OxfordIIITPet(root, split="trainval"), "test": OxfordIIITPet(root, split="test")}
    found = {split: list(zip(part._images, part._labels, strict=True)) for split, part in parts.items()}
    train = parts["train"]
    kind = dict(zip(train._labels, train._bin_labels, strict=True))
    species = tuple(train.bin_classes[kind[i]] for i in range(len(train.classes)))
    return train.classes, found, (TaxonomyLevel(name="species", groups=species),)


def _flowers(root: Path) -> _Found:
    from torchvision.datasets import Flowers102

    parts = {split: Flowers102(root, split=split) for split in ("train", "val", "test")}
    found = {split: list(zip(part._image_files, part._labels, strict=True)) for split, part in parts.items()}
    return Flowers102.classes, found, ()


_READERS: dict[str, tuple[Callable[[Path], _Found], str]] = {
    "fgvc-aircraft": (_aircraft, "fgvc-aircraft-2013b/data/ with images/, variants.txt and images_variant_*.txt"),
    "stanford-cars": (
        _cars,
        "stanford_cars/ with cars_train/, cars_test/, cars_test_annos_withlabels.mat and devkit/ (and SciPy installed)",
    ),
    "oxford-pets": (_pets, "oxford-iiit-pet/ with images/ and annotations/"),
    "flowers-102": (_flowers, "flowers-102/ with jpg/, imagelabels.mat and setid.mat (and SciPy installed)"),
}


def _inaturalist(root: Path) -> DatasetIndex:
    version, mark, rest = root.as_posix().partition(":")
    # A relative root was joined to its folder, the version included.
    base, _, version = version.rpartition("/")
    if mark and version in _INAT_VERSIONS:
        root = Path(base) / rest
    else:
        version = "2021_train"
    try:
        data = _inat_version(root, version)
        found = {"train" if version.startswith("2021_train") else "all": _inat_samples(data)}
        if "train" in found and (root / "2021_valid").is_dir():
            valid = _inat_version(root, "2021_valid")
            if valid.all_categories != data.all_categories:
                raise ValueError("2021_valid has other categories than the training images")
            found["test"] = _inat_samples(valid)
    except (RuntimeError, OSError, ValueError) as exc:
        needed = f"{version}/<category>/*.jpg, with version one of {', '.join(_INAT_VERSIONS)}"
        raise _missing("inaturalist", root, needed, exc) from exc
    names = {level: {index: name for name, index in own.items()} for level, own in data.categories_index.items()}
    taxonomy = tuple(
        TaxonomyLevel(name=level, groups=tuple(own[category[level]] for category in data.categories_map))
        for level, own in names.items()
    )
    return _index("inaturalist", root, data.all_categories, found, taxonomy)


def _inat_version(root: Path, version: str) -> Any:
    from torchvision.datasets import INaturalist

    if not (root / version).is_dir():  # torchvision would create the root
        raise FileNotFoundError(f"{root / version} does not exist")
    return INaturalist(root, version=version)


def _inat_samples(data: Any) -> list[tuple[Any, int]]:
    return [(Path(data.root) / data.all_categories[category] / name, category) for category, name in data.index]


def _index(
    name: str,
    root: Path,
    labels: Sequence[str],
    found: dict[str, list[tuple[Any, int]]],
    taxonomy: tuple[TaxonomyLevel, ...],
) -> DatasetIndex:
    return DatasetIndex(
        format=name,
        root=root,
        labels=tuple(str(label) for label in labels),
        splits={
            split: tuple(
                sorted(
                    Sample(Path(path), int(label))
                    for path, label in samples
                    if Path(path).suffix.lower() in IMAGE_SUFFIXES and not Path(path).name.startswith(".")
                )
            )
            for split, samples in found.items()
        },
        taxonomy=taxonomy,
    )


def _missing(name: str, root: Path, needed: str, error: Exception) -> DataError:
    return DataError(f"torchvision cannot read {name} in {root} ({one_line(error)}); it expects {root}/{needed}")
