"""CSV manifests and CUB's own files, read as a device without torch reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from edgefg.data.cub import is_cub, read_cub
from edgefg.data.folders import public_root, read_split
from edgefg.data.index import read_csv, write_csv
from edgefg.data.split import SPLITS, Sample
from edgefg.errors import DataError
from edgefg.settings.split import SplitSpec
from edgefg.taxonomy import TaxonomyLevel
from tests.cub import write_cub

HEADER = "path,label,split,group\n"


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def call(text: str) -> Path:
        path = tmp_path / "list.csv"
        path.write_text(text, encoding="utf-8")
        return path

    return call


def test_every_column(write, tmp_path: Path) -> None:
    """Another order, a column more, spaces, a byte order mark, empty lines and quoted commas are no harm."""
    path = write(
        "\ufeffgroup,condition, label,path,split,camera\n"
        'lake, dusk ,"Owl, barn",a/1.jpg,train,7\n'
        "\n"
        ",dawn,Bee,/elsewhere/2.jpg,test,7\n"
        "lake,,Bee,a/3.jpg,train,7\n"
    )
    listing = read_csv(path)
    assert (listing.format, listing.root, listing.labels) == ("csv", tmp_path, ("Bee", "Owl, barn"))
    assert listing.found == {
        "train": (Sample(tmp_path / "a/1.jpg", 1), Sample(tmp_path / "a/3.jpg", 0)),
        "test": (Sample(Path("/elsewhere/2.jpg"), 0),),
    }
    assert listing.groups == {tmp_path / "a/1.jpg": "lake", tmp_path / "a/3.jpg": "lake"}
    assert listing.conditions == {tmp_path / "a/1.jpg": "dusk", Path("/elsewhere/2.jpg"): "dawn"}


@pytest.mark.parametrize("text", ["path,label\na.jpg,x\nb.jpg,y\n", "path,label,split\na.jpg,x,\nb.jpg,y,\n"])
def test_without_splits(write, tmp_path: Path, text: str) -> None:
    listing = read_csv(write(text))
    assert listing.found == {"all": (Sample(tmp_path / "a.jpg", 0), Sample(tmp_path / "b.jpg", 1))}
    assert listing.groups == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has the columns none; needed path and label"),
        ("path,class\na.jpg,x\n", "has the columns path, class; needed path and label"),
        ("path,label,path\na.jpg,x,b.jpg\n", "each once"),
        ("path,label,condition,condition\na.jpg,x,day,day\n", "split, group and condition, each once"),
        (HEADER, "lists no image"),
        ("path,label\na.jpg,x,y\n", "row 2 has 3 fields, the header 2; quote fields"),
        ("path,label\na.jpg,x\nb.jpg, \n", "row 3 has no label"),
        ("path,label\na.jpg,x\n,x\n", "row 3 has no path"),
        ("path,label\na.jpg,x\na.jpg,y\n", r"row 3 lists .*a\.jpg a second time"),
        (HEADER + "a.jpg,x,dev,\n", "row 2 has the split 'dev'; needed one of train, val, test"),
        (HEADER + "a.jpg,x,train,\nb.jpg,x,,\n", "row 3 has no split, others have"),
        (HEADER + "a.jpg,x,train,lot 7\nb.jpg,x,test,lot 7\n", "the group 'lot 7' lies in train and in test"),
        ("path,label\na.jpg,\udcff\n", "cannot be read as UTF-8 text"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "list.csv"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=message) as caught:
        read_csv(path)
    assert "\n" not in str(caught.value)


def test_a_list_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.csv is not there; needed a CSV file"):
        read_split(tmp_path / "gone.csv", None, ["x"], None)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    labels = ("wasp, common", "ant")
    splits = {
        "train": (Sample(tmp_path / "data/b.jpg", 0), Sample(tmp_path / "elsewhere/c.jpg", 1)),
        "val": (),
        "test": (Sample(tmp_path / "data/sub/a.jpg", 1),),
    }
    groups = {tmp_path / "data/b.jpg": "camera 1"}
    path = tmp_path / "data" / "list.csv"
    write_csv(path, splits, labels, groups, [TaxonomyLevel(name="sort", groups=("yellow", "black"))])
    assert path.read_text() == (
        "path,label,split,group\n"
        'b.jpg,"wasp, common",train,camera 1\n'
        f"{tmp_path}/elsewhere/c.jpg,ant,train,\n"
        "sub/a.jpg,ant,test,\n"
    )
    assert (tmp_path / "data" / "taxonomy.csv").read_text() == 'class,sort\n"wasp, common",yellow\nant,black\n'
    listing = read_csv(path)
    assert listing.groups == groups
    assert listing.labels == ("ant", "wasp, common")  # the training room takes the order from taxonomy.csv
    assert {part: [path for path, _ in members] for part, members in listing.found.items()} == {
        part: [path for path, _ in members] for part, members in splits.items() if members
    }


def test_written_conditions_are_read_again(tmp_path: Path) -> None:
    night, day = tmp_path / "a.jpg", tmp_path / "b.jpg"
    splits = {"train": (Sample(night, 0), Sample(day, 1))}
    write_csv(tmp_path / "list.csv", splits, ("ant", "bee"), {}, conditions={night: "night, infrared"})
    text = 'path,label,split,condition\na.jpg,ant,train,"night, infrared"\nb.jpg,bee,train,\n'
    assert (tmp_path / "list.csv").read_text() == text
    assert read_csv(tmp_path / "list.csv").conditions == {night: "night, infrared"}


def test_another_taxonomy_is_not_overwritten(tmp_path: Path) -> None:
    splits = {"train": (Sample(tmp_path / "a.jpg", 0), Sample(tmp_path / "b.jpg", 1))}
    write_csv(tmp_path / "one.csv", splits, ("b", "a"), {})
    write_csv(tmp_path / "two.csv", splits, ("b", "a"), {})
    with pytest.raises(DataError, match=r"taxonomy\.csv has other classes than the data; write into another folder"):
        write_csv(tmp_path / "three.csv", splits, ("c", "a"), {})
    assert not (tmp_path / "three.csv").exists()


def test_a_split_of_a_list_goes_by_label_name(write, tmp_path: Path) -> None:
    path = write("path,label,split\n1.jpg,ant,train\n2.jpg,bee,train\n3.jpg,bee,test\n4.jpg,new,val\n")
    labels = ("bee", "ant")
    assert read_split(path, None, labels, None) == ("test", (Sample(tmp_path / "3.jpg", 0),))
    assert read_split(path, "train", labels, None)[1] == (Sample(tmp_path / "1.jpg", 1), Sample(tmp_path / "2.jpg", 0))
    with pytest.raises(DataError, match=r"1 classes that the artifact does not know \(first: 'new'"):
        read_split(path, "val", labels, None)
    with pytest.raises(DataError, match="has the splits train, val, test; needed dev/"):
        read_split(path, "dev", labels, None)


@pytest.mark.parametrize("split_column", [False, True])
def test_a_list_is_split_as_training_did(tmp_path: Path, split_column: bool) -> None:
    """Without splits all three are made here; with train and test alone, val is a part of train; groups stay whole."""
    from edgefg.data.load import load_data

    rows = []
    for i in range(60):
        cv2.imwrite(str(tmp_path / f"{i}.png"), np.full((4, 4, 3), 4 * i, np.uint8))
        part = ("test" if i >= 40 else "train") if split_column else ""
        rows.append(f"{i}.png,{'ant' if i % 4 < 2 else 'bee'},{part},pair {i // 2}")
    (tmp_path / "list.csv").write_text(HEADER + "\n".join(rows))
    spec = SplitSpec(seed=3)
    trained = load_data(tmp_path / "list.csv", spec).splits
    for split in SPLITS:
        name, samples = read_split(tmp_path / "list.csv", split, ("bee", "ant"), spec)
        assert (name, len(samples)) == (split, len(trained[split]))
        assert samples == tuple(Sample(path, 1 - label) for path, label in trained[split])
    if not split_column:
        assert read_split(tmp_path / "list.csv", None, ("bee", "ant"), None)[0] == "all"


def test_cub(tmp_path: Path) -> None:
    root = write_cub(tmp_path / "CUB_200_2011")
    assert is_cub(root)
    listing = read_cub(root)
    assert listing.labels == ("001.Black_footed_Albatross", "002.Laysan_Albatross")
    assert {part: len(members) for part, members in listing.found.items()} == {"train": 12, "test": 4}
    for members in listing.found.values():
        assert all(listing.labels[label] == path.parent.name and path.is_file() for path, label in members)
    name, samples = read_split(root, None, listing.labels, None)
    assert (name, samples) == ("test", listing.found["test"])


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
        ("classes.txt", "1 001.Black_footed_Albatross\n", "lacks the class 2 of image_class_labels.txt"),
        ("classes.txt", "1 same\n2 same\n", "gives two classes one name"),
        ("train_test_split.txt", "\n".join(f"{i} 3" for i in range(1, 17)), "has the mark '3'; needed 1"),
        ("train_test_split.txt", "1 1\n1 0\n", "line 2: '1 0' is not an identifier of its own and a value"),
        ("images.txt", "1\n", "line 1: '1' is not an identifier of its own and a value"),
    ],
)
def test_broken_files_of_cub_are_named(tmp_path: Path, file: str, text: str | None, message: str) -> None:
    root = write_cub(tmp_path)
    (root / file).unlink() if text is None else (root / file).write_text(text)
    with pytest.raises(DataError, match=message):
        read_cub(root)


def test_public_data_sets_are_known_by_their_names(tmp_path: Path) -> None:
    assert public_root(Path("flowers-102:/data/x")) == ("flowers-102", Path("/data/x"))
    assert public_root(Path("flowers-102:x/y")) == ("flowers-102", Path("x/y"))
    assert public_root(Path("inaturalist:2021_valid:x")) == ("inaturalist", Path("2021_valid:x"))
    # As `Path.resolve` leaves them.
    assert public_root(Path("/here/flowers-102:/data/x")) == ("flowers-102", Path("/data/x"))
    assert public_root(Path("/here/flowers-102:x")) == ("flowers-102", Path("/here/x"))
    for other in ("flowers-102", "flowers-102:", "my-flowers-102:x", "flowers:x", "data/birds", "C:/birds"):
        assert public_root(Path(other)) is None
    (tmp_path / "flowers-102:x").mkdir()
    assert public_root(tmp_path / "flowers-102:x") is None


def test_a_device_asks_for_a_list_of_public_data() -> None:
    with pytest.raises(DataError, match=r"edgefg data flowers-102:/x --csv flowers-102\.csv"):
        read_split(Path("flowers-102:/x"), None, ["a", "b"], None)
