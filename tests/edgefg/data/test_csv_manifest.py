"""CSV manifests, read and written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edgefg.data.csv_manifest import is_csv, read_csv, write_csv
from edgefg.data.split import Sample
from edgefg.errors import DataError
from edgefg.taxonomy import TaxonomyLevel

HEADER = "path,label,split,group\n"


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def call(text: str) -> Path:
        path = tmp_path / "list.csv"
        path.write_text(text, encoding="utf-8")
        return path

    return call


def test_every_column(write: Callable[[str], Path], tmp_path: Path) -> None:
    """Another order, a column more, spaces, a byte order mark, empty lines and quoted commas are no harm."""
    path = write(
        "\ufeffgroup,condition, label,path,split,camera\n"
        'lake, dusk ,"Owl, barn",a/1.jpg,train,7\n'
        "\n"
        ",dawn,Bee,/elsewhere/2.jpg,test,7\n"
        "lake,,Bee,a/3.jpg,train,7\n"
    )
    index = read_csv(path)
    assert (index.format, index.root, index.labels) == ("csv", tmp_path, ("Bee", "Owl, barn"))
    assert index.splits == {
        "train": (Sample(tmp_path / "a/1.jpg", 1), Sample(tmp_path / "a/3.jpg", 0)),
        "test": (Sample(Path("/elsewhere/2.jpg"), 0),),
    }
    assert index.groups == {tmp_path / "a/1.jpg": "lake", tmp_path / "a/3.jpg": "lake"}
    assert index.conditions == {tmp_path / "a/1.jpg": "dusk", Path("/elsewhere/2.jpg"): "dawn"}


@pytest.mark.parametrize("text", ["path,label\na.jpg,x\nb.jpg,y\n", "path,label,split\na.jpg,x,\nb.jpg,y,\n"])
def test_without_splits(write: Callable[[str], Path], tmp_path: Path, text: str) -> None:
    index = read_csv(write(text))
    assert index.splits == {"all": (Sample(tmp_path / "a.jpg", 0), Sample(tmp_path / "b.jpg", 1))}
    assert index.groups == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has the columns none; it needs path and label"),
        ("path,class\na.jpg,x\n", "has the columns path, class; it needs path and label"),
        ("path,label,path\na.jpg,x,b.jpg\n", "and each of them once"),
        (
            "path,label,condition,condition\na.jpg,x,day,day\n",
            "may have split, group and condition, and each of them once",
        ),
        (HEADER, "lists no images"),
        ("path,label\na.jpg,x,y\n", "row 2 has 3 fields, the header 2; quote fields"),
        ("path,label\na.jpg,x\nb.jpg, \n", "row 3 has no label"),
        ("path,label\na.jpg,x\n,x\n", "row 3 has no path"),
        ("path,label\na.jpg,x\na.jpg,y\n", r"row 3 lists .*a\.jpg a second time"),
        (HEADER + "a.jpg,x,dev,\n", "row 2 has the unknown split 'dev'; use one of train, val, test"),
        (HEADER + "a.jpg,x,train,\nb.jpg,x,,\n", "row 3 has no split, but other rows have"),
        (HEADER + "a.jpg,x,train,lot 7\nb.jpg,x,test,lot 7\n", "group 'lot 7' is in train and in test"),
        ("path,label\na.jpg,\udcff\n", "cannot be read as UTF-8 text"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "list.csv"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=message) as caught:
        read_csv(path)
    assert "\n" not in str(caught.value)


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
    index = read_csv(path)
    assert index.groups == groups
    assert index.labels == ("ant", "wasp, common")  # `load_dataset` takes the order from taxonomy.csv
    assert {part: [path for path, _ in members] for part, members in index.splits.items()} == {
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
    with pytest.raises(DataError, match=r"taxonomy\.csv has other classes than the data; write to another folder"):
        write_csv(tmp_path / "three.csv", splits, ("c", "a"), {})
    assert not (tmp_path / "three.csv").exists()


def test_what_names_a_manifest(tmp_path: Path) -> None:
    assert is_csv(tmp_path / "gone.CSV")
    assert not is_csv(tmp_path / "list.txt")
    (tmp_path / "folder.csv").mkdir()
    assert not is_csv(tmp_path / "folder.csv")


def test_a_file_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.csv does not exist; give a CSV file with the columns path and label"):
        read_csv(tmp_path / "gone.csv")
