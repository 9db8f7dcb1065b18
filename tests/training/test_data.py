from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest

from edgefg.errors import DataError
from edgefg.split import SplitSpec
from edgefg.training.data import load_data


def write_images(folder: Path, count: int, seed: int = 0) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng([seed, len(folder.name)])
    for i in range(count):
        cv2.imwrite(str(folder / f"{i}.jpg"), rng.integers(0, 255, (24, 24, 3), np.uint8))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split, count in (("train", 4), ("val", 2), ("test", 2)):
        for name in ("ant", "bee"):
            write_images(tmp_path / "data" / split / name, count)
    return tmp_path / "data"


def test_split_folders(root: Path) -> None:
    data = load_data(root)
    assert data.labels == ("ant", "bee")
    assert {name: len(samples) for name, samples in data.splits.items()} == {"train": 8, "val": 4, "test": 4}
    assert data.splits["train"][-1].label == 1
    assert not data.skipped


def test_val_may_lack_a_class_and_be_absent(root: Path) -> None:
    shutil.rmtree(root / "val" / "bee")
    assert len(load_data(root).splits["val"]) == 2
    shutil.rmtree(root / "val")
    write_images(root / "train" / "cat", 20)
    data = load_data(root, SplitSpec(val=0.2))
    assert len(data.splits["train"]) + len(data.splits["val"]) == 28
    assert len(data.splits["val"]) == pytest.approx(28 * 0.2, abs=2)
    assert len(data.splits["test"]) == 4


def test_one_folder_is_split(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        write_images(tmp_path / name, 20)
    data = load_data(tmp_path)
    assert {name: len(samples) for name, samples in data.splits.items()} == {"train": 28, "val": 6, "test": 6}


def test_taxonomy_sets_order_and_levels(root: Path) -> None:
    (root / "taxonomy.csv").write_text("class,order\nbee,hymenoptera\nant,formicidae\n")
    data = load_data(root)
    assert data.labels == ("bee", "ant")
    assert data.taxonomy[0].name == "order"
    assert data.taxonomy[0].groups == ("hymenoptera", "formicidae")
    assert data.splits["train"][0].path.parent.name == "ant"
    assert data.splits["train"][0].label == 1


def test_the_fingerprint_sees_contents_splits_and_names(root: Path) -> None:
    first = load_data(root).fingerprint
    assert load_data(root).fingerprint == first
    image = root / "train" / "ant" / "0.jpg"
    original = image.read_bytes()
    cv2.imwrite(str(image), np.zeros((24, 24, 3), np.uint8))
    changed = load_data(root).fingerprint
    image.write_bytes(original)
    image.rename(image.with_name("9.jpg"))
    assert len({first, changed, load_data(root).fingerprint}) == 3


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda root: shutil.rmtree(root), "is not a folder; needed DATA/train"),
        (lambda root: (root / "train" / "cat").mkdir(), "class folder .*cat holds no image"),
        (lambda root: write_images(root / "val" / "cat", 1), r"val/ has 1 classes that train/ lacks \(first: 'cat'\)"),
        (lambda root: (root / "val").rename(root / "valid"), "valid/ where edgefg reads val/"),
        (lambda root: shutil.rmtree(root / "train" / "ant"), "holds 1 class folders; needed at least 2"),
        (lambda root: (root / "taxonomy.csv").write_text("class,g\nant,a\ndog,b\n"), "lists 'dog', which train/"),
        (lambda root: (root / "taxonomy.csv").write_text("ant,a\n"), "needs a header 'class"),
        (lambda root: (root / "taxonomy.csv").write_text("class\nant\nant\n"), "lists a class twice"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(root: Path, break_it, message: str) -> None:
    break_it(root)
    with pytest.raises(DataError, match=message) as caught:
        load_data(root)
    assert "\n" not in str(caught.value)


def test_corrupt_images_are_counted_and_named_and_may_be_left_out(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = root / "train" / "ant" / "1.jpg"
    cut.write_bytes(cut.read_bytes()[:-40])
    (root / "train" / "bee" / "2.jpg").write_bytes(b"")
    (root / "test" / "bee" / "0.jpg").write_text("no image")
    with pytest.raises(DataError, match=r"^3 of 16 images cannot be used: .*1\.jpg is cut off.*--skip-corrupt"):
        load_data(root)
    capsys.readouterr()
    data = load_data(root, skip_corrupt=True)
    assert len(data.skipped) == 3
    assert [line.partition(":")[0] for line in capsys.readouterr().err.splitlines()] == ["left out"] * 3
    assert [len(data.splits[name]) for name in ("train", "val", "test")] == [6, 4, 3]


def test_a_class_whose_images_are_all_corrupt_is_named(root: Path) -> None:
    for image in (root / "train" / "bee").iterdir():
        image.write_bytes(b"\xff\xd8")
    with pytest.raises(DataError, match=r"1 classes have no training image \(first: 'bee'\)"):
        load_data(root, skip_corrupt=True)


class Seen(NamedTuple):
    labels: tuple[str, ...]
    dataset: str


def test_other_labels_than_the_checkpoint_s(root: Path) -> None:
    with pytest.raises(DataError, match=r"2 classes, the checkpoint 2: 1 missing, 1 unknown \(first: 'wasp'\)"):
        load_data(root, like=Seen(("bee", "wasp"), ""))


def test_data_that_are_split_here_must_be_the_very_same(root: Path, tmp_path: Path) -> None:
    """Else a test image could have been a training image."""
    for name in ("ant", "bee"):
        write_images(tmp_path / "flat" / name, 20)
    flat = tmp_path / "flat"
    seen = Seen(("ant", "bee"), load_data(flat).fingerprint)
    assert load_data(flat, like=seen).fingerprint == seen.dataset
    (flat / "ant" / "3.jpg").unlink()
    with pytest.raises(DataError, match="its test images may have been trained on"):
        load_data(flat, like=seen)
    load_data(root, like=Seen(("ant", "bee"), "other"))


def test_an_image_less_leaves_the_others_where_they_were(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        write_images(tmp_path / name, 100)
    before = load_data(tmp_path).splits
    (tmp_path / "ant" / "50.jpg").unlink()
    after = load_data(tmp_path).splits
    moved = set(before["test"]) & set(after["train"]) | set(before["train"]) & set(after["test"])
    assert len(moved) <= 12  # a seeded shuffle moves about 90
