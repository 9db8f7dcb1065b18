from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgefg.data import load_dataset
from edgefg.data.boxes import choose_parts, read_boxes
from edgefg.data.dataset import write_manifests
from edgefg.errors import DataError
from tests.synthetic import write_dataset

_HEADER = "path,part,x0,y0,x1,y1\n"


def _write(folder: Path, text: str) -> list[Path]:
    (folder / "boxes.csv").write_text(text, encoding="utf-8")
    return [folder / "a" / "1.png", folder / "b" / "2.png"]


def test_reads_what_is_there_and_nan_where_a_part_is_absent(tmp_path: Path) -> None:
    images = _write(tmp_path, _HEADER + "a/1.png,head,1,2,3,4\n\nb/2.png,object,0,0,9,9.5\na/1.png,object,0,1,8,8\n")
    parts, boxes = read_boxes(tmp_path, images)
    assert parts == ("object", "head")
    nan = np.nan
    np.testing.assert_array_equal(boxes[images[0]], np.array([[0, 1, 8, 8], [1, 2, 3, 4]], np.float32))
    np.testing.assert_array_equal(boxes[images[1]], np.array([[0, 0, 9, 9.5], [nan] * 4], np.float32))
    assert boxes[images[1]].dtype == np.float32


def test_no_file_is_no_boxes(tmp_path: Path) -> None:
    assert read_boxes(tmp_path, []) == ((), {})


def test_boxes_of_left_out_images_are_passed_over(tmp_path: Path) -> None:
    images = _write(tmp_path, _HEADER + "a/1.png,object,0,0,1,1\nb/2.png,object,0,0,1,1\n")
    assert list(read_boxes(tmp_path, images[:1], images[1:])[1]) == images[:1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has the columns none; it needs path,part"),
        ("file,part,x0,y0,x1,y1\n", "has the columns file,part"),
        (_HEADER + "a/1.png,head,1,2,3\n", "line 2 has 5 fields instead of 6"),
        (_HEADER + "a/1.png,head,1,2,3,four\n", "line 2: 1,2,3,four is not four numbers"),
        (_HEADER + "a/1.png,head,3,2,3,4\n", "x0=3, y0=2, x1=3, y1=4 is empty"),
        (_HEADER + "a/1.png,head,1,5,3,4\n", "is empty; x0 < x1 and y0 < y1 is required"),
        (_HEADER + "a/1.png,head,nan,2,3,4\n", "is empty"),
        (_HEADER + "a/1.png,,1,2,3,4\n", "the part has no name"),
        (_HEADER + "c/3.png,head,1,2,3,4\n", "line 2: 'c/3.png' is not an image of this data set"),
        (_HEADER + 2 * "a/1.png,head,1,2,3,4\n", "line 3: 'a/1.png' has a second box of 'head'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    images = _write(tmp_path, text)
    with pytest.raises(DataError) as caught:
        read_boxes(tmp_path, images)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "boxes.csv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(DataError, match="UTF-8"):
        read_boxes(tmp_path, [])


def test_choose_parts_takes_columns_in_the_asked_order() -> None:
    box = np.arange(12, dtype=np.float32).reshape(3, 4)
    chosen = choose_parts(("object", "head", "wing"), {Path("x"): box}, ("object", "wing"))
    np.testing.assert_array_equal(chosen[Path("x")], box[[0, 2]])
    with pytest.raises(DataError, match=r"boxes\.csv has no boxes of the part 'beak'; it has: object, head, wing"):
        choose_parts(("object", "head", "wing"), {}, ("beak",))


def test_load_dataset_carries_boxes_and_they_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "birds", classes=2, per_class=5, size=48)
    data = load_dataset(root)
    assert data.parts[0] == "object"
    assert set(data.parts) >= {"head", "wing", "mark"}
    assert data.boxes is not None
    assert set(data.boxes) == {sample.path for members in data.splits.values() for sample in members}
    assert all(found.shape == (len(data.parts), 4) and not np.isnan(found).any() for found in data.boxes.values())
    lines = (root / "boxes.csv").read_text().splitlines()
    (root / "boxes.csv").write_text("\n".join(lines[:-1]) + "\n")
    assert load_dataset(root).fingerprint != data.fingerprint
    (root / "boxes.csv").unlink()
    bare = load_dataset(root)
    assert (bare.parts, bare.boxes) == ((), None)


def test_boxes_go_along_with_a_csv_of_the_data(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "birds", classes=2, per_class=5, size=48)
    data = load_dataset(root)
    for path in (tmp_path / "lists" / "a.csv", root / "b.csv"):
        write_manifests({path: data.splits}, data, {})
        again = load_dataset(path)
        assert again.parts == data.parts
        assert data.boxes is not None
        assert again.boxes is not None
        same = {image.resolve(): box for image, box in again.boxes.items()}
        assert same.keys() == {image.resolve() for image in data.boxes}
        assert all(np.array_equal(same[image.resolve()], box, equal_nan=True) for image, box in data.boxes.items())
    (tmp_path / "lists" / "boxes.csv").write_text("another data set's")
    with pytest.raises(DataError, match=r"boxes\.csv exists and has other boxes"):
        write_manifests({tmp_path / "lists" / "c.csv": data.splits}, data, {})
