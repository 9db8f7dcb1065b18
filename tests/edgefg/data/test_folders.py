from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from edgefg.data.folders import class_samples, read_split
from edgefg.data.split import SPLITS
from edgefg.errors import DataError
from edgefg.settings.split import SplitSpec

LABELS = ("wasp", "ant")


def write_images(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        cv2.imwrite(str(folder / f"{i}.png"), np.full((4, 4, 3), i, np.uint8))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for split in SPLITS:
        for name in LABELS:
            write_images(tmp_path / "data" / split / name, 3)
    return tmp_path / "data"


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    for name in LABELS:
        write_images(tmp_path / "flat" / name, 20)
    return tmp_path / "flat"


def test_labels_go_by_name(data: Path) -> None:
    name, samples = read_split(data, None, LABELS, None)
    assert name == "test"
    assert len(samples) == 6
    assert all(LABELS[sample.label] == sample.path.parent.name for sample in samples)


def test_what_none_stands_for(data: Path) -> None:
    assert read_split(data, None, LABELS, None, prefer=("val",))[0] == "val"
    shutil.rmtree(data / "test")
    assert read_split(data, None, LABELS, None)[0] == "val"
    shutil.rmtree(data / "val")
    with pytest.raises(DataError, match=r"has the splits train; needed test or val; or say --split train"):
        read_split(data, None, LABELS, None)
    assert read_split(data, "train", LABELS, None)[0] == "train"


def test_flat_data_are_split_as_training_did(flat: Path) -> None:
    from edgefg.data.load import load_data

    spec = SplitSpec(seed=4)
    trained = load_data(flat, spec).splits
    for split in SPLITS:
        name, samples = read_split(flat, split, ("ant", "wasp"), spec)
        assert name == split
        assert samples == trained[split]
    assert read_split(flat, None, LABELS, spec)[0] == "test"


def test_a_carved_validation_split_is_training_s_too(data: Path) -> None:
    from edgefg.data.load import load_data

    shutil.rmtree(data / "val")
    spec = SplitSpec(val=0.4)
    trained = load_data(data, spec).splits
    for split in SPLITS:
        assert read_split(data, split, ("ant", "wasp"), spec)[1] == trained[split]


def test_data_that_are_split_here_must_be_those_of_training(flat: Path) -> None:
    """An image more would move training images into the test split."""
    from edgefg.data.load import load_data

    spec = SplitSpec(seed=4)
    trained = load_data(flat, spec)
    labels, origin = trained.labels, trained.fingerprint
    assert read_split(flat, "test", labels, spec, trained_on=origin)[1] == trained.splits["test"]
    cv2.imwrite(str(flat / "ant" / "99.png"), np.full((4, 4, 3), 99, np.uint8))
    with pytest.raises(
        DataError, match=r"not the data that the artifact was trained on .* may have been trained on; res"
    ):
        read_split(flat, "test", labels, spec, trained_on=origin)
    (flat / "ant" / "99.png").unlink()
    cv2.imwrite(str(flat / "ant" / "3.png"), np.full((4, 4, 3), 99, np.uint8))
    with pytest.raises(DataError, match="the artifact was trained on"):
        read_split(flat, "test", labels, spec, trained_on=origin)


def test_unreadable_images_are_left_out_before_the_split_is_made(
    flat: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from edgefg.data.load import load_data

    spec = SplitSpec(seed=4, group=r"(..)\.png")
    for name in ("3.png", "17.png"):
        (flat / "ant" / name).write_bytes(b"cut off")
    trained = load_data(flat, spec, skip_corrupt=True)
    with pytest.raises(DataError, match="2 of 40 images cannot be used"):
        read_split(flat, "test", trained.labels, spec, trained_on=trained.fingerprint)
    capsys.readouterr()
    for split in SPLITS:
        found = read_split(flat, split, trained.labels, spec, trained_on=trained.fingerprint, skip_corrupt=True)
        assert found == (split, trained.splits[split])
    assert capsys.readouterr().err.count("left out: ") == 6


def test_splits_of_their_own_need_not_be_those_of_training(data: Path) -> None:
    (data / "test" / "ant" / "0.png").write_bytes(b"cut off")
    assert len(read_split(data, "test", LABELS, SplitSpec(), trained_on="other")[1]) == 6
    shutil.rmtree(data / "val")
    assert read_split(data, "test", LABELS, SplitSpec(), trained_on="other")[0] == "test"
    (data / "test" / "ant" / "0.png").unlink()
    with pytest.raises(DataError, match="the artifact was trained on"):
        read_split(data, "val", LABELS, SplitSpec(), trained_on="other")


def test_flat_data_of_an_unknown_split_are_taken_whole(flat: Path) -> None:
    assert read_split(flat, None, LABELS, None)[0] == "all"
    assert len(read_split(flat, None, LABELS, None)[1]) == 40
    with pytest.raises(DataError, match="has no splits; needed test/"):
        read_split(flat, "test", LABELS, None)


def test_what_is_missing_or_unknown_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere is not a folder"):
        read_split(tmp_path / "nowhere", None, LABELS, None)
    with pytest.raises(DataError, match="needed dev/"):
        read_split(data, "dev", LABELS, None)
    with pytest.raises(DataError, match=r"1 class folders .* \(first: 'wasp'"):
        class_samples(data / "test", ["ant", "Wasp"])
    with pytest.raises(DataError, match="holds no class folder"):
        class_samples(data / "test" / "ant", LABELS)
    (data / "val").rename(data / "Validation")
    with pytest.raises(DataError, match="has Validation/ where edgefg reads val/; rename it"):
        read_split(data, "test", LABELS, None)
    (data / "test" / "bee").mkdir()
    with pytest.raises(DataError, match="bee holds no image"):
        class_samples(data / "test", [*LABELS, "bee"])


def test_hidden_files_are_no_images(data: Path) -> None:
    (data / "test" / "ant" / "._0.png").write_bytes(b"macOS")
    (data / "test" / ".cache").mkdir()
    assert len(read_split(data, "test", LABELS, None)[1]) == 6
