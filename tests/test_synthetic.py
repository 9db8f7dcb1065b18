"""The synthetic birds are what they claim: alike but for the mark, with true boxes, the same for the same seed."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

import cv2
import numpy as np
import pytest

from edgefg.image_io import image_files, read_image
from tests.synthetic import MARKS, PARTS, TELLING_PART, draw, write_dataset


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("birds"), classes=3, per_class=10, size=64, seed=7)


def test_layout(root: Path) -> None:
    for split, count in {"train": 6, "val": 2, "test": 2}.items():
        assert sorted(path.name for path in (root / split).iterdir()) == sorted(list(MARKS)[:3])
        for folder in (root / split).iterdir():
            assert len(image_files(folder)) == count
    assert {path.suffix for path in image_files(root)} == {".jpg", ".png"}
    assert all(read_image(path).shape == (64, 64, 3) for path in image_files(root))


def test_boxes(root: Path) -> None:
    boxes: dict[str, dict[str, list[int]]] = defaultdict(dict)
    with (root / "boxes.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            boxes[row["path"]][row["part"]] = [int(row[edge]) for edge in ("x0", "y0", "x1", "y1")]
    assert set(boxes) == {path.relative_to(root).as_posix() for path in image_files(root)}
    for parts in boxes.values():
        assert set(parts) == {*PARTS, TELLING_PART, "object"}
        for x0, y0, x1, y1 in parts.values():
            assert 0 <= x0 < x1 <= 64
            assert 0 <= y0 < y1 <= 64
            assert parts["object"][0] <= x0
            assert parts["object"][3] >= y1


@pytest.mark.parametrize("seed", range(5))
def test_classes_differ_in_the_mark_only(seed: int) -> None:
    reference, boxes = draw(np.random.default_rng(seed), "disc", 96)
    for kind in list(MARKS)[1:]:
        image, others = draw(np.random.default_rng(seed), kind, 96)
        differs = np.abs(image.astype(int) - reference).max(axis=2) > 0
        assert differs.any()
        for x0, y0, x1, y1 in (boxes[TELLING_PART], others[TELLING_PART]):
            differs[max(0, y0 - 1) : y1 + 1, max(0, x0 - 1) : x1 + 1] = False
        assert not differs.any(), kind
        assert {part: box for part, box in others.items() if part != TELLING_PART} == {
            part: box for part, box in boxes.items() if part != TELLING_PART
        }


def test_marks_have_one_area() -> None:
    bright = []
    for kind in MARKS:
        image, _ = draw(np.random.default_rng(11), kind, 256)
        reference, _ = draw(np.random.default_rng(11), "disc" if kind != "disc" else "bar", 256)
        bright.append(
            float(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY).mean() - cv2.cvtColor(reference, cv2.COLOR_BGR2GRAY).mean())
        )
    assert np.abs(bright).max() < 0.5


def test_the_seed_decides_everything(root: Path, tmp_path: Path) -> None:
    again = write_dataset(tmp_path / "again", classes=3, per_class=10, size=64, seed=7)
    other = write_dataset(tmp_path / "other", classes=3, per_class=10, size=64, seed=8)
    for path in image_files(root):
        name = path.relative_to(root)
        assert (again / name).read_bytes() == path.read_bytes()
        assert (other / name).read_bytes() != path.read_bytes()
    assert (again / "boxes.csv").read_bytes() == (root / "boxes.csv").read_bytes()


@pytest.mark.parametrize("classes", [1, len(MARKS) + 1])
def test_number_of_classes(classes: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"got {classes}"):
        write_dataset(tmp_path, classes=classes)
