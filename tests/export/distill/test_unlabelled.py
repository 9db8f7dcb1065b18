from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edgefg.data import ImageDataset, load_dataset
from edgefg.data.split import UNLABELLED
from edgefg.errors import DataError
from edgefg.export.distill.unlabelled import read_unlabelled
from edgefg.image_io import image_files
from tests.synthetic import write_dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    return load_dataset(write_dataset(tmp_path_factory.mktemp("birds"), classes=2, per_class=10, size=32, seed=2))


@pytest.fixture
def wild(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "wild", classes=3, per_class=5, size=32, seed=9)


def test_every_image_at_any_depth_in_one_order(data: ImageDataset, wild: Path) -> None:
    extra = read_unlabelled(wild, data)
    assert [sample.path for sample in extra.samples] == image_files(wild)
    assert {sample.label for sample in extra.samples} == {UNLABELLED}
    assert read_unlabelled(wild, data) == extra
    before = extra.fingerprint
    shutil.copy(image_files(wild)[0], wild / "more.jpg")
    assert read_unlabelled(wild, data).fingerprint != before


@pytest.mark.parametrize("split", ["val", "test"])
def test_held_out_images_never_slip_in(split: str, data: ImageDataset, wild: Path) -> None:
    held = [sample.path for sample in data.splits[split]][:2]
    (wild / "zoo").mkdir()
    for number, path in enumerate(held):
        shutil.copy(path, wild / "zoo" / f"{number}{path.suffix}")
    total = len(image_files(wild))
    name = held[0].relative_to(data.root).as_posix()
    message = rf"2 of its {total} images are .* \(first: zoo/0{held[0].suffix} is {name} of {split}\)"
    with pytest.raises(DataError, match=message):
        read_unlabelled(wild, data)


def test_training_images_may_be_among_them(data: ImageDataset, wild: Path) -> None:
    shutil.copy(data.splits["train"][0].path, wild / "known.jpg")
    assert len(read_unlabelled(wild, data).samples) == len(image_files(wild))


def test_unreadable_images(data: ImageDataset, wild: Path, caplog: pytest.LogCaptureFixture) -> None:
    (wild / "text.jpg").write_text("no image")
    with pytest.raises(DataError, match=r"1 of 16 images cannot be used: text\.jpg is not an image"):
        read_unlabelled(wild, data)
    assert len(read_unlabelled(wild, data, skip_corrupt=True).samples) == 15
    assert caplog.messages[-1].startswith("left out: text.jpg")


def test_nothing_to_read(data: ImageDataset, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        read_unlabelled(tmp_path / "none", data)
    with pytest.raises(DataError, match="has no images"):
        read_unlabelled(tmp_path, data)
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(DataError, match="none of its 1 images can be read"):
        read_unlabelled(tmp_path, data, skip_corrupt=True)
