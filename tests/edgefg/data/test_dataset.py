"""Whole data sets: `load_dataset` and what is written from them."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest

from edgefg.data import load_dataset
from edgefg.data.calibration import choose_balanced
from edgefg.data.csv_manifest import write_csv
from edgefg.data.dataset import write_manifests
from edgefg.data.split import SPLITS
from edgefg.errors import DataError
from edgefg.settings.split import SplitSpec
from tests.edgefg.data.conftest import write_images


def test_split_folders(root: Path) -> None:
    data = load_dataset(root)
    assert data.labels == ("ant", "bee")
    assert {name: len(samples) for name, samples in data.splits.items()} == {"train": 8, "val": 4, "test": 4}
    assert data.splits["train"][-1].label == 1
    assert not data.unreadable


def test_val_may_lack_a_class_and_be_absent(root: Path) -> None:
    shutil.rmtree(root / "val" / "bee")
    assert len(load_dataset(root).splits["val"]) == 2
    shutil.rmtree(root / "val")
    write_images(root / "train" / "cat", 20)
    data = load_dataset(root, SplitSpec(val=0.2))
    assert len(data.splits["train"]) + len(data.splits["val"]) == 28
    assert len(data.splits["val"]) == pytest.approx(28 * 0.2, abs=2)
    assert len(data.splits["test"]) == 4


def test_one_folder_is_split(flat: Path) -> None:
    data = load_dataset(flat)
    assert {name: len(samples) for name, samples in data.splits.items()} == {"train": 28, "val": 6, "test": 6}


def test_taxonomy_sets_order_and_levels(root: Path) -> None:
    (root / "taxonomy.csv").write_text("class,order\nbee,hymenoptera\nant,formicidae\n")
    data = load_dataset(root)
    assert data.labels == ("bee", "ant")
    assert data.taxonomy[0].name == "order"
    assert data.taxonomy[0].groups == ("hymenoptera", "formicidae")
    assert data.splits["train"][0].path.parent.name == "ant"
    assert data.splits["train"][0].label == 1


def test_the_fingerprint_sees_contents_splits_and_names(root: Path) -> None:
    first = load_dataset(root).fingerprint
    assert load_dataset(root).fingerprint == first
    image = root / "train" / "ant" / "0.jpg"
    original = image.read_bytes()
    cv2.imwrite(str(image), np.zeros((24, 24, 3), np.uint8))
    changed = load_dataset(root).fingerprint
    image.write_bytes(original)
    image.rename(image.with_name("9.jpg"))
    assert len({first, changed, load_dataset(root).fingerprint}) == 3


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda root: shutil.rmtree(root), "is not a folder; give DATA/<split>/<class>/"),
        (lambda root: (root / "train" / "cat").mkdir(), "class folder .*cat has no images; add some"),
        (lambda root: write_images(root / "val" / "cat", 1), r"1 of 3 classes have no training image \(first: 'cat'\)"),
        (lambda root: (root / "val").rename(root / "valid"), "has valid/, but edgefg expects val/"),
        (lambda root: (root / "test").rename(root / "Test"), "has Test/, but edgefg expects test/; rename it"),
        (
            lambda root: [(root / s).rename(root / s.title()) for s in ("train", "test")],
            "has Test/, but edgefg expects",
        ),
        (lambda root: (root / "train").rename(root / "Training"), "has Training/, but edgefg expects train/"),
        (lambda root: shutil.rmtree(root / "train"), "has no training images; its splits are val, test"),
        (lambda root: shutil.rmtree(root / "train" / "ant"), r"1 of 2 classes have no training image \(first: 'ant'\)"),
        (
            lambda root: [shutil.rmtree(root / s / "ant") for s in SPLITS],
            "has 1 classes, but training needs at least 2",
        ),
        (
            lambda root: (root / "taxonomy.csv").write_text("class,g\nant,a\ndog,b\n"),
            r"have different classes \(first: 'bee'\)",
        ),
        (lambda root: (root / "taxonomy.csv").write_text("ant,a\n"), "needs a header 'class"),
        (lambda root: (root / "taxonomy.csv").write_text("class\nant\nant\n"), "lists a class twice"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(root: Path, break_it: Callable[[Path], object], message: str) -> None:
    break_it(root)
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(root)
    assert "\n" not in str(caught.value)


def test_corrupt_images_are_counted_and_named_and_may_be_left_out(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    cut = root / "train" / "ant" / "1.jpg"
    cut.write_bytes(cut.read_bytes()[:-40])
    (root / "train" / "bee" / "2.jpg").write_bytes(b"")
    (root / "test" / "bee" / "0.jpg").write_text("no image")
    with pytest.raises(DataError, match=r": 3 of 16 images cannot be used: .*1\.jpg is cut off.*--skip-corrupt"):
        load_dataset(root)
    data = load_dataset(root, skip_corrupt=True)
    assert len(data.unreadable) == 3
    assert [message.partition(":")[0] for message in caplog.messages] == ["left out"] * 3
    assert [len(data.splits[name]) for name in ("train", "val", "test")] == [6, 4, 3]


def test_a_class_whose_images_are_all_corrupt_is_named(root: Path) -> None:
    for image in (root / "train" / "bee").iterdir():
        image.write_bytes(b"\xff\xd8")
    with pytest.raises(DataError, match=r"1 of 2 classes have no training image \(first: 'bee'\)"):
        load_dataset(root, skip_corrupt=True)


def test_ignored_files_are_counted(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load_dataset(root).ignored_files == {}
    assert not caplog.messages
    for place in ("train/ant/a.HEIC", "test/bee/b.heic", "train/bee/notes", "train/bee/.hidden", "train/list.txt"):
        (root / place).write_text("x")
    assert load_dataset(root).ignored_files == {".heic": 2, "": 1}
    (message,) = caplog.messages
    assert message.startswith(f"3 files in the class folders of {root} are ignored (.heic 2, no suffix 1); convert")


class Record(NamedTuple):
    labels: tuple[str, ...]
    dataset: str
    split: SplitSpec = SplitSpec()


def test_other_labels_than_the_checkpoint_s(root: Path) -> None:
    with pytest.raises(DataError, match=r"2 classes, the checkpoint 2: 1 missing, 1 unknown \(first: 'wasp'\)"):
        load_dataset(root, expected=Record(("bee", "wasp"), ""))


def test_data_without_fixed_splits_must_be_the_same(root: Path, flat: Path) -> None:
    """Otherwise a test image could have been a training image."""
    seen = Record(("ant", "bee"), load_dataset(flat).fingerprint)
    assert load_dataset(flat, expected=seen).fingerprint == seen.dataset
    (flat / "ant" / "3.jpg").unlink()
    with pytest.raises(
        DataError, match=r"has changed since the checkpoint was trained .* now be test images; restore it"
    ):
        load_dataset(flat, expected=seen)
    load_dataset(root, expected=Record(("ant", "bee"), "other"))


def test_an_image_less_leaves_the_others_where_they_were(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        write_images(tmp_path / name, 100)
    before = load_dataset(tmp_path).splits
    (tmp_path / "ant" / "50.jpg").unlink()
    after = load_dataset(tmp_path).splits
    moved = set(before["test"]) & set(after["train"]) | set(before["train"]) & set(after["test"])
    assert len(moved) <= 12  # a seeded shuffle moves about 90


def test_the_fingerprint_is_what_checkpoints_hold(root: Path) -> None:
    """Of every format: a line an image, in the order of the splits; and the bytes of boxes.csv."""
    data = load_dataset(root)
    lines = [
        f"{split}\t{label}\t{path.relative_to(root).as_posix()}\t{hashlib.sha256(path.read_bytes()).hexdigest()}\n"
        for split in ("train", "val", "test")
        for label, name in enumerate(("ant", "bee"))
        for path in sorted((root / split / name).iterdir())
    ]
    assert data.fingerprint == hashlib.sha256("".join(lines).encode()).hexdigest()
    write_csv(root / "all.csv", data.splits, data.labels, {})
    assert load_dataset(root / "all.csv").fingerprint == data.fingerprint
    (root / "boxes.csv").write_text("path,part,x0,y0,x1,y1\ntrain/ant/0.jpg,object,1,2,8,9\n")
    lines.append((root / "boxes.csv").read_text())
    assert load_dataset(root).fingerprint == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_a_csv_manifest_is_the_same_data(root: Path) -> None:
    folders = load_dataset(root)
    write_csv(root.parent / "list.csv", folders.splits, folders.labels, {})
    listed = load_dataset(root.parent / "list.csv")
    assert listed.splits == folders.splits
    assert (listed.labels, listed.format, listed.root) == (folders.labels, "csv", root.parent)


def test_conditions_are_carried_and_balance_the_calibration(root: Path) -> None:
    folders = load_dataset(root)
    images = [path for samples in folders.splits.values() for path, _ in samples]
    conditions = {path: "night infrared" for path in images if path.stem == "0"}
    write_csv(root.parent / "list.csv", folders.splits, folders.labels, {}, conditions=conditions)
    listed = load_dataset(root.parent / "list.csv")
    assert listed.conditions == conditions
    write_manifests({root.parent / "again.csv": listed.splits}, listed, {})
    assert (root.parent / "again.csv").read_text() == (root.parent / "list.csv").read_text()
    chosen = choose_balanced(listed.splits["train"], 4, conditions=listed.conditions)
    assert sorted(conditions.get(path, "") for path in chosen) == ["", "", "night infrared", "night infrared"]


def test_a_csv_manifest_without_splits_is_split_by_its_groups(root: Path) -> None:
    images = sorted(root.rglob("*.jpg"))
    rows = [f"{path.relative_to(root)},{path.parent.name},lot {i // 2}" for i, path in enumerate(images)]
    (root / "list.csv").write_text("\n".join(["path,label,group", *rows]))
    data = load_dataset(root / "list.csv")
    assert sum(map(len, data.splits.values())) == len(images)
    lots = [{data.groups[path] for path, _ in data.splits[split]} for split in ("train", "val", "test")]
    assert sum(map(len, lots)) == len(set.union(*lots)) == len(images) / 2
    with pytest.raises(DataError, match="names groups, and the pattern 'ant' defines others"):
        load_dataset(root / "list.csv", SplitSpec(group="ant"))


def test_taxonomy_of_a_csv_manifest(root: Path) -> None:
    data = load_dataset(root)
    write_csv(root / "list.csv", data.splits, data.labels, {})
    (root / "taxonomy.csv").write_text("class,order\nbee,hymenoptera\nant,formicidae\n")
    listed = load_dataset(root / "list.csv")
    assert listed.labels == ("bee", "ant")
    assert {listed.labels[label] == path.parent.name for path, label in listed.splits["train"]} == {True}
    (root / "taxonomy.csv").write_text("class\nbee\nfly\n")
    with pytest.raises(DataError, match=r"have different classes \(first: 'ant'\)"):
        load_dataset(root / "list.csv")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["train/ant/0.jpg,ant,test", "train/bee/0.jpg,bee,test"], "has no training images; its splits are test"),
        (["train/ant/0.jpg,ant,train", "test/bee/0.jpg,bee,test"], r"1 of 2 classes have no training image .*'bee'"),
        (["train/ant/0.jpg,ant,train"], "has 1 classes, but training needs at least 2"),
        (["gone.jpg,ant,train", "train/bee/0.jpg,bee,train"], r"1 of 2 images .*gone\.jpg: No such file"),
    ],
)
def test_a_csv_manifest_that_cannot_be_trained_on(root: Path, rows: list[str], message: str) -> None:
    (root / "list.csv").write_text("\n".join(["path,label,split", *rows]))
    with pytest.raises(DataError, match=message):
        load_dataset(root / "list.csv")


def test_a_loaded_data_set_is_returned_as_it_is(root: Path) -> None:
    data = load_dataset(root)
    assert load_dataset(data) is data
    assert load_dataset(data, expected=Record(("ant", "bee"), "other")) is data
    with pytest.raises(DataError, match=r"2 classes, the checkpoint 2: 0 missing, 0 unknown \(first: 'order'\)"):
        load_dataset(data, expected=Record(("bee", "ant"), ""))


def test_the_split_of_the_checkpoint_is_the_default(flat: Path) -> None:
    spec = SplitSpec(seed=4)
    data = load_dataset(flat, spec)
    assert data.splits != load_dataset(flat).splits
    assert load_dataset(flat, expected=Record(data.labels, data.fingerprint, spec)).splits == data.splits
