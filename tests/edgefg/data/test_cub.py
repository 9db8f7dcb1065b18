"""CUB's own files: the official split, and boxes of the bird, its head and its body."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgefg.data import load_dataset, load_split
from edgefg.data.cub import is_cub, part_box, read_cub
from edgefg.errors import DataError
from edgefg.settings.split import SplitSpec
from tests.cub import write_cub

WITHIN = np.array([5, 4, 55, 34], np.float32)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_cub(tmp_path / "cub")


def test_cub(tmp_path: Path) -> None:
    root = write_cub(tmp_path / "CUB_200_2011")
    assert is_cub(root)
    index = read_cub(root)
    assert index.labels == ("001.Black_footed_Albatross", "002.Laysan_Albatross")
    assert {part: len(members) for part, members in index.splits.items()} == {"train": 12, "test": 4}
    for members in index.splits.values():
        assert all(index.labels[label] == path.parent.name and path.is_file() for path, label in members)
    name, samples = load_split(root, None, index.labels, None)
    assert (name, samples) == ("test", index.splits["test"])


def test_a_class_without_image_is_no_class(tmp_path: Path) -> None:
    """NABirds' classes.txt lists the coarser classes too."""
    root = write_cub(tmp_path)
    (root / "classes.txt").write_text("0 Birds\n2 002.Laysan_Albatross\n1 001.Black_footed_Albatross\n")
    assert read_cub(root).labels == ("002.Laysan_Albatross", "001.Black_footed_Albatross")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("image_class_labels.txt", None, "image_class_labels.txt, one of CUB's files, cannot be read"),
        ("image_class_labels.txt", "1 1\n", r"lacks 15 images of images.txt \(first: 2\)"),
        ("classes.txt", "1 001.Black_footed_Albatross\n", "lacks class 2 of image_class_labels.txt"),
        ("classes.txt", "1 same\n2 same\n", "gives two classes the same name"),
        ("train_test_split.txt", "\n".join(f"{i} 3" for i in range(1, 17)), "has the flag '3' instead of 1"),
        ("train_test_split.txt", "1 1\n1 0\n", "line 2: '1 0' is not a unique identifier and a value"),
        ("images.txt", "1\n", "line 1: '1' is not a unique identifier and a value"),
    ],
)
def test_broken_files_of_cub_are_named(tmp_path: Path, file: str, text: str | None, message: str) -> None:
    root = write_cub(tmp_path)
    (root / file).unlink() if text is None else (root / file).write_text(text)
    with pytest.raises(DataError, match=message):
        read_cub(root)


def test_the_official_split_and_a_validation_part_of_train(root: Path) -> None:
    data = load_dataset(root, SplitSpec(val=0.25))
    assert {part: len(samples) for part, samples in data.splits.items()} == {"train": 8, "val": 4, "test": 4}
    assert (data.format, data.labels[1]) == ("cub", "002.Laysan_Albatross")


def test_object_head_and_body(root: Path) -> None:
    """Point p lies at x = 10 + 2p, y = 5 + p; the head's are 2 (beak) to 15 (throat), the body's 1 (back) to 14 (tail).

    Both stretch 26 pixels, of which 15 % are 3.9.
    """
    data = load_dataset(root)
    assert data.parts == ("object", "head", "body")
    assert data.boxes is not None
    assert set(data.boxes) == {path for samples in data.splits.values() for path, _ in samples}
    expected = np.array([[5, 4, 55, 34], [10.1, 4, 43.9, 23.9], [8.1, 4, 41.9, 22.9]])
    for boxes in data.boxes.values():
        assert boxes.dtype == np.float32
        np.testing.assert_allclose(boxes, expected, rtol=1e-6)


def test_invisible_points_do_not_count(root: Path) -> None:
    """With the beak alone there is no head; without the tail the body ends at the right wing (13)."""
    kept = []
    for line in (root / "parts" / "part_locs.txt").read_text().splitlines():
        image, point, x, y, _ = line.split()
        hidden = image == "1" and point in ("5", "6", "7", "10", "11", "14", "15")
        kept.append(f"{image} {point} 0.0 0.0 0" if hidden else f"{image} {point} {x} {y} 1")
    (root / "parts" / "part_locs.txt").write_text("\n".join(kept))
    boxes = load_dataset(root).boxes
    assert boxes is not None
    (first,) = (found for path, found in boxes.items() if path.stem.endswith("_0000_1"))
    np.testing.assert_allclose(first[0], WITHIN)
    assert np.isnan(first[1]).all()
    np.testing.assert_allclose(first[2], [12 - 0.15 * 24, 4, 36 + 0.15 * 24, 18 + 0.15 * 24], rtol=1e-6)


def test_a_box_stays_in_the_object_s() -> None:
    points = np.array([[10, 10], [54, 33]], np.float32)
    np.testing.assert_allclose(part_box(points, WITHIN, 0.1), [5.6, 5.6, 55, 34], rtol=1e-6)
    assert np.isnan(part_box(points[:1], WITHIN)).all()
    assert np.isnan(part_box(points + 100, WITHIN)).all()


def test_without_parts_or_boxes(root: Path) -> None:
    whole = load_dataset(root)
    (root / "parts" / "part_locs.txt").unlink()
    data = load_dataset(root)
    assert data.parts == ("object",)
    assert data.boxes is not None
    assert {boxes.shape for boxes in data.boxes.values()} == {(1, 4)}
    (root / "bounding_boxes.txt").unlink()
    bare = load_dataset(root)
    assert (bare.parts, bare.boxes) == ((), None)
    assert len({whole.fingerprint, data.fingerprint, bare.fingerprint}) == 3


def test_boxes_csv_comes_first(root: Path) -> None:
    image = (root / "images.txt").read_text().split()[1]
    (root / "boxes.csv").write_text(f"path,part,x0,y0,x1,y1\nimages/{image},mark,1,2,8,9\n")
    assert load_dataset(root).parts == ("mark",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("bounding_boxes.txt", "1 5.0 4.0 50.0 30.0", "1 5.0 4.0 0.0 30.0"),
            "image 1: the box of 0×30 pixels is empt",
        ),
        (("bounding_boxes.txt", "1 5.0 4.0 50.0 30.0\n", ""), "has no box for image 1; restore it"),
        (("bounding_boxes.txt", "1 5.0 4.0 50.0 30.0", "1 5.0 4.0 x 30.0"), "'5.0 4.0 x 30.0' is not 4 numbers"),
        (("parts/part_locs.txt", "1 2 14.0 7.0 1", "1 2 14.0 7.0"), "line 2: '14.0 7.0' is not 3 numbers"),
        (("parts/part_locs.txt", "1 2 14.0 7.0 1", "1 99 14.0 7.0 1"), "line 2: parts.txt has no point '99'"),
    ],
)
def test_broken_files_of_boxes_are_named(root: Path, change: tuple[str, str, str], message: str) -> None:
    file, old, new = change
    text = (root / file).read_text()
    assert old in text
    (root / file).write_text(text.replace(old, new, 1))
    with pytest.raises(DataError, match=message):
        load_dataset(root)
