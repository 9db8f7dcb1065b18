"""Summary of a data set."""

from __future__ import annotations

import shutil
from pathlib import Path

from edgefg.data import load_dataset
from edgefg.data.describe import describe, render


def test_counts(root: Path) -> None:
    shutil.rmtree(root / "test")
    (root / "train" / "bee" / "3.jpg").unlink()
    (root / "train" / "bee" / "notes.txt").touch()
    data = load_dataset(root)
    summary = describe("insects", data, duplicates=False)
    assert list(summary.splits) == ["train", "val"]
    train = summary.splits["train"]
    assert (train.images, train.classes, train.groups) == (7, 2, None)
    assert (train.min_per_class, train.median_per_class, train.max_per_class) == (3, 3.5, 4)
    assert summary.smallest_classes == (("bee", 3), ("ant", 4))
    assert summary.ignored_files == {".txt": 1}
    assert (summary.parts, summary.images_with_boxes, summary.duplicates) == ((), 0, None)


def test_text(root: Path) -> None:
    shutil.copy(root / "train" / "ant" / "0.jpg", root / "test" / "bee" / "copy.jpg")
    data = load_dataset(root)
    lines = render(describe("insects", data), data).splitlines()
    assert lines[0] == "insects: format folders, 2 classes"
    assert "train          8        2       –   4, 4, 4" in lines
    assert "parts: none" in lines
    assert "ignored files: none" in lines
    place = lines.index("duplicates in two splits: 1")
    assert lines[place + 1] == "  train/ant/0.jpg (train, ant) = test/bee/copy.jpg (test, bee): identical files"
    assert "duplicates with two labels: 1" in lines
    assert lines[-1] == "duplicates within one split and class: none"
