"""The index itself: class order, taxonomy, names in lists."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgefg.data.index import (
    DatasetIndex,
    apply_taxonomy,
    count_by_suffix,
    listed_path,
    read_taxonomy,
    write_taxonomy,
)
from edgefg.data.split import Sample
from edgefg.errors import DataError
from edgefg.taxonomy import TaxonomyLevel

LEVELS = (TaxonomyLevel(name="order", groups=("hymenoptera", "formicidae")),)


@pytest.fixture
def index(tmp_path: Path) -> DatasetIndex:
    samples = (Sample(tmp_path / "a.jpg", 0), Sample(tmp_path / "b.jpg", 1))
    return DatasetIndex(format="csv", root=tmp_path, labels=("ant", "bee"), splits={"all": samples})


def test_other_class_order(index: DatasetIndex) -> None:
    other = index.with_labels(["wasp", "bee", "ant"])
    assert [sample.label for sample in other.splits["all"]] == [2, 1]
    assert [sample.path for sample in other.splits["all"]] == [sample.path for sample in index.splits["all"]]


def test_taxonomy(index: DatasetIndex) -> None:
    assert apply_taxonomy(index) is index
    file = index.root / "taxonomy.csv"
    write_taxonomy(file, ("bee", "ant"), LEVELS)
    assert read_taxonomy(file) == (("bee", "ant"), LEVELS)
    ordered = apply_taxonomy(index)
    assert (ordered.labels, ordered.taxonomy) == (("bee", "ant"), LEVELS)
    assert [sample.label for sample in ordered.splits["all"]] == [1, 0]
    write_taxonomy(file, ("bee", "ant"), ())
    assert read_taxonomy(file)[1] == LEVELS
    with pytest.raises(DataError, match="has other classes than the data; write to another folder"):
        write_taxonomy(file, ("bee", "fly"), ())
    file.write_text("class\nbee\nfly\n")
    with pytest.raises(DataError, match=r"taxonomy\.csv and the data have different classes \(first: 'ant'\)"):
        apply_taxonomy(index)


def test_paths_in_lists(tmp_path: Path) -> None:
    (tmp_path / "data" / "images").mkdir(parents=True)
    folder = (tmp_path / "data").resolve()
    (tmp_path / "data" / "link.jpg").symlink_to(tmp_path / "elsewhere.jpg")
    assert listed_path(folder, tmp_path / "data" / "images" / "a.jpg") == "images/a.jpg"
    assert listed_path(folder, tmp_path / "data" / "link.jpg") == "link.jpg"
    assert listed_path(folder, tmp_path / "b.jpg") == (tmp_path.resolve() / "b.jpg").as_posix()


def test_suffixes_are_sorted_by_count() -> None:
    assert count_by_suffix({"": 1, ".heic": 3}) == ".heic 3, no suffix 1"
