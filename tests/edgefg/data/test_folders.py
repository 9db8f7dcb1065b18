"""Class folders."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edgefg.data.folders import read_folders, split_folders
from edgefg.data.split import Sample
from edgefg.errors import DataError


def test_splits_and_classes(root: Path) -> None:
    index = read_folders(root)
    assert (index.format, index.root, index.labels) == ("folders", root, ("ant", "bee"))
    assert {split: len(samples) for split, samples in index.splits.items()} == {"train": 8, "val": 4, "test": 4}
    images = [root / "test" / name / f"{i}.jpg" for name in ("ant", "bee") for i in range(2)]
    assert index.splits["test"] == tuple(Sample(image, int(image.parent.name == "bee")) for image in images)


def test_only_the_requested_splits_are_read(root: Path) -> None:
    (root / "train" / "empty").mkdir()
    assert set(read_folders(root, ["test"]).splits) == {"test"}
    with pytest.raises(DataError, match=r"class folder .*empty has no images; add some, or remove the folder"):
        read_folders(root)


def test_without_splits(flat: Path) -> None:
    index = read_folders(flat)
    assert {split: len(samples) for split, samples in index.splits.items()} == {"all": 40}
    assert read_folders(flat, ["all"]) == index


def test_hidden_files_are_left_out_and_others_counted(root: Path) -> None:
    (root / "test" / "ant" / "._0.jpg").write_bytes(b"macOS")
    (root / "test" / ".cache").mkdir()
    (root / "test" / "ant" / "notes.TXT").touch()
    (root / "train" / "bee" / "list.txt").touch()
    index = read_folders(root)
    assert len(index.splits["test"]) == 4
    assert index.ignored_files == {".txt": 2}


def test_misspelt_splits_and_missing_folders(root: Path) -> None:
    shutil.rmtree(root / "val")
    assert split_folders(root) == ["train", "test"]
    (root / "Validation").mkdir()
    with pytest.raises(DataError, match=r"has Validation/, but edgefg expects val/; rename it"):
        split_folders(root)
    with pytest.raises(DataError, match=r"gone is not a folder; give DATA/<split>/<class>/\*\.jpg"):
        read_folders(root / "gone")
