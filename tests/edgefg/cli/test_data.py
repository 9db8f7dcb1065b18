"""`edgefg data`."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import pytest

from edgefg.data.csv_manifest import read_csv
from tests.conftest import Run
from tests.synthetic import write_dataset


@pytest.fixture
def run(run: Run) -> Run:
    """Run `edgefg data ARGUMENTS`; returns exit status, standard output and standard error."""
    return functools.partial(run, "data")


@pytest.fixture
def birds(tmp_path: Path) -> Path:
    """Two classes, 6 + 2 + 2 images each; a test image lies in train too, under the other label, and one is cut off."""
    root = write_dataset(tmp_path / "birds", classes=2, per_class=10, size=48, seed=1)
    one, other = sorted(path for path in (root / "train").iterdir())
    shutil.copy(sorted((root / "test" / one.name).iterdir())[0], other / "zz.jpg")
    cut = sorted((root / "val" / one.name).iterdir())[0]
    cut.write_bytes(cut.read_bytes()[:-30])
    (root / "boxes.csv").unlink()
    return root


def test_what_it_says(run: Run, birds: Path) -> None:
    status, out, err = run(birds)
    assert status == 0
    assert "format folders, 2 classes" in out
    assert "train         13        2       –   6, 6.5, 7" in out
    assert "val            3        2       –   1, 1.5, 2" in out
    assert "unreadable images: 1\n" in out
    assert "is cut off after" in out
    assert "duplicates in two splits: 1\n" in out
    assert "duplicates with two labels: 1\n" in out
    assert "zz.jpg (train, " in out
    assert ": identical files" in out
    assert "warning: 1 images are also in another split" in err


def test_as_json(run: Run, birds: Path) -> None:
    found = json.loads(run(birds, "--json")[1])
    assert found["splits"]["train"] == {
        "images": 13,
        "classes": 2,
        "min_per_class": 6,
        "median_per_class": 6.5,
        "max_per_class": 7,
        "groups": None,
    }
    assert found["smallest_classes"] == [[found["labels"][0], 6], [found["labels"][1], 7]]
    (pair,) = found["duplicates"]["across_splits"]
    assert (pair["exact"], pair["labels"], pair["splits"]) == (True, [1, 0], ["train", "test"])
    assert json.loads(run(birds, "--json", "--quick")[1])["duplicates"] is None


def test_the_list_it_writes_is_the_same_data(run: Run, birds: Path, tmp_path: Path) -> None:
    list_ = tmp_path / "list.csv"
    _, output, notes = run(birds, "--json", "--quick", "--csv", list_)
    assert f"written: {list_}" in notes
    folders = json.loads(output)
    listed = json.loads(run(list_, "--json", "--quick")[1])
    assert listed["format"] == "csv"
    assert (listed["splits"], listed["labels"]) == (folders["splits"], folders["labels"])
    assert not listed["unreadable"]
    assert all(path.is_relative_to(birds) for path, _ in read_csv(list_).splits["train"])


def test_files_that_are_not_read_are_counted(run: Run, birds: Path) -> None:
    assert "ignored files: none\n" in run(birds, "--quick")[1]
    next((birds / "train").rglob("*.*g")).with_suffix(".heic").write_text("x")
    assert "ignored files: 1 (.heic 1)" in run(birds, "--quick")[1]
    assert json.loads(run(birds, "--json", "--quick")[1])["ignored_files"] == {".heic": 1}


def test_groups_are_counted(run: Run, birds: Path, tmp_path: Path) -> None:
    images = sorted((birds / "train").rglob("*.*g"))
    rows = [f"{path},{path.parent.name},{'train' if i % 4 else 'test'},pond {i % 4}" for i, path in enumerate(images)]
    (tmp_path / "list.csv").write_text("\n".join(["path,label,split,group", *rows]))
    _, out, _ = run(tmp_path / "list.csv", "--quick")
    assert "train          9        2       3 " in out
    assert "test           4        2       1 " in out


def test_bad_input_ends_2(run: Run, tmp_path: Path) -> None:
    status, out, err = run(tmp_path / "nowhere")
    assert (status, out) == (2, "")
    assert err.startswith("edgefg: ")
    assert len(err.splitlines()) == 1
