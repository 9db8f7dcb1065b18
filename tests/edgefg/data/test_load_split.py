"""The images of one split, as `verify`, `evaluate` and `bench` list them."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from edgefg.data import load_dataset, load_split
from edgefg.data.split import SPLITS, Sample
from edgefg.errors import DataError
from edgefg.settings.split import SplitSpec

LABELS = ("bee", "ant")


def test_labels_go_by_name(root: Path) -> None:
    name, samples = load_split(root, None, LABELS, None)
    assert name == "test"
    assert len(samples) == 4
    assert all(LABELS[sample.label] == sample.path.parent.name for sample in samples)


def test_what_none_stands_for(root: Path) -> None:
    assert load_split(root, None, LABELS, None, prefer=("val",))[0] == "val"
    shutil.rmtree(root / "test")
    assert load_split(root, None, LABELS, None)[0] == "val"
    shutil.rmtree(root / "val")
    with pytest.raises(DataError, match=r"has the splits train, neither of test, val; choose one with --split"):
        load_split(root, None, LABELS, None)
    assert load_split(root, "train", LABELS, None)[0] == "train"


def test_flat_data_are_split_as_training_did(flat: Path) -> None:
    spec = SplitSpec(seed=4)
    trained = load_dataset(flat, spec).splits
    for split in SPLITS:
        name, samples = load_split(flat, split, ("ant", "bee"), spec)
        assert name == split
        assert samples == trained[split]
    assert load_split(flat, None, LABELS, spec)[0] == "test"


def test_a_carved_validation_split_is_training_s_too(root: Path) -> None:
    shutil.rmtree(root / "val")
    spec = SplitSpec(val=0.4)
    trained = load_dataset(root, spec).splits
    for split in SPLITS:
        assert load_split(root, split, ("ant", "bee"), spec)[1] == trained[split]


def test_data_that_are_split_here_must_be_those_of_training(flat: Path) -> None:
    """An image more would move training images into the test split."""
    spec = SplitSpec(seed=4)
    trained = load_dataset(flat, spec)
    labels, origin = trained.labels, trained.fingerprint
    assert load_split(flat, "test", labels, spec, trained_on=origin)[1] == trained.splits["test"]
    cv2.imwrite(str(flat / "ant" / "99.jpg"), np.full((4, 4, 3), 99, np.uint8))
    with pytest.raises(DataError, match=r"has changed since the artifact was trained .* may now be test images; res"):
        load_split(flat, "test", labels, spec, trained_on=origin)
    (flat / "ant" / "99.jpg").unlink()
    cv2.imwrite(str(flat / "ant" / "3.jpg"), np.full((4, 4, 3), 99, np.uint8))
    with pytest.raises(DataError, match="has changed since the artifact was trained"):
        load_split(flat, "test", labels, spec, trained_on=origin)


def test_unreadable_images_are_left_out_before_the_split_is_made(flat: Path, caplog: pytest.LogCaptureFixture) -> None:
    spec = SplitSpec(seed=4, group=r"(..)\.jpg")
    for name in ("3.jpg", "17.jpg"):
        (flat / "ant" / name).write_bytes(b"cut off")
    trained = load_dataset(flat, spec, skip_corrupt=True)
    with pytest.raises(DataError, match="2 of 40 images cannot be used"):
        load_split(flat, "test", trained.labels, spec, trained_on=trained.fingerprint)
    caplog.clear()
    for split in SPLITS:
        found = load_split(flat, split, trained.labels, spec, trained_on=trained.fingerprint, skip_corrupt=True)
        assert found == (split, trained.splits[split])
    assert [message.partition(":")[0] for message in caplog.messages] == ["left out"] * 6


def test_splits_of_their_own_need_not_be_those_of_training(root: Path) -> None:
    (root / "test" / "ant" / "0.jpg").write_bytes(b"cut off")
    assert len(load_split(root, "test", LABELS, SplitSpec(), trained_on="other")[1]) == 4
    shutil.rmtree(root / "val")
    assert load_split(root, "test", LABELS, SplitSpec(), trained_on="other")[0] == "test"
    (root / "test" / "ant" / "0.jpg").unlink()
    with pytest.raises(DataError, match="has changed since the artifact was trained"):
        load_split(root, "val", LABELS, SplitSpec(), trained_on="other")


def test_flat_data_of_an_unknown_split_are_taken_whole(flat: Path) -> None:
    assert load_split(flat, None, LABELS, None)[0] == "all"
    assert len(load_split(flat, None, LABELS, None)[1]) == 40
    with pytest.raises(DataError, match="has no splits; leave --split out"):
        load_split(flat, "test", LABELS, None)


def test_what_is_missing_or_unknown_is_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere is not a folder"):
        load_split(tmp_path / "nowhere", None, LABELS, None)
    with pytest.raises(DataError, match="has the splits train, val, test, not dev"):
        load_split(root, "dev", LABELS, None)
    with pytest.raises(DataError, match=r"1 classes that are not among the artifact's 2 labels \(first: 'bee'"):
        load_split(root, "test", ["ant", "Wasp"], None)
    shutil.rmtree(root / "test" / "ant")
    shutil.rmtree(root / "test" / "bee")
    with pytest.raises(DataError, match=r"data has no images for the split test; add some, one folder per class"):
        load_split(root, "test", LABELS, None)
    (root / "test" / "bee").mkdir()
    with pytest.raises(DataError, match="bee has no images"):
        load_split(root, "test", LABELS, None)
    (root / "val").rename(root / "Validation")
    with pytest.raises(DataError, match=r"has Validation/, but edgefg expects val/; rename it"):
        load_split(root, "test", LABELS, None)


def test_a_list_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.csv does not exist; give a CSV file"):
        load_split(tmp_path / "gone.csv", None, ["x"], None)


def test_a_split_of_a_list_goes_by_label_name(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_text("path,label,split\n1.jpg,ant,train\n2.jpg,bee,train\n3.jpg,bee,test\n4.jpg,new,val\n")
    labels = ("bee", "ant")
    assert load_split(path, None, labels, None) == ("test", (Sample(tmp_path / "3.jpg", 0),))
    assert load_split(path, "train", labels, None)[1] == (Sample(tmp_path / "1.jpg", 1), Sample(tmp_path / "2.jpg", 0))
    with pytest.raises(DataError, match=r"1 classes that are not among the artifact's 2 labels \(first: 'new'"):
        load_split(path, "val", labels, None)
    with pytest.raises(DataError, match="has the splits train, val, test, not dev"):
        load_split(path, "dev", labels, None)


@pytest.mark.parametrize("split_column", [False, True])
def test_a_list_is_split_as_training_did(tmp_path: Path, split_column: bool) -> None:
    """Without splits all three are made here; with train and test alone, val is a part of train; groups stay whole."""
    rows = []
    for i in range(60):
        cv2.imwrite(str(tmp_path / f"{i}.jpg"), np.full((4, 4, 3), 4 * i, np.uint8))
        part = ("test" if i >= 40 else "train") if split_column else ""
        rows.append(f"{i}.jpg,{'ant' if i % 4 < 2 else 'bee'},{part},pair {i // 2}")
    (tmp_path / "list.csv").write_text("path,label,split,group\n" + "\n".join(rows))
    spec = SplitSpec(seed=3)
    trained = load_dataset(tmp_path / "list.csv", spec).splits
    for split in SPLITS:
        name, samples = load_split(tmp_path / "list.csv", split, ("bee", "ant"), spec)
        assert (name, len(samples)) == (split, len(trained[split]))
        assert samples == tuple(Sample(path, 1 - label) for path, label in trained[split])
    if not split_column:
        assert load_split(tmp_path / "list.csv", None, ("bee", "ant"), None)[0] == "all"


def test_a_device_asks_for_a_list_of_public_data() -> None:
    with pytest.raises(DataError, match=r"edgefg data flowers-102:/x --csv flowers-102\.csv"):
        load_split(Path("flowers-102:/x"), None, ["a", "b"], None)
