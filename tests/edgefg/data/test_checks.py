"""Checks of images and what is logged about them."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest

from edgefg.data import load_dataset
from edgefg.data.checks import check_images, corrupt_message, require_same_data
from edgefg.errors import DataError
from edgefg.progress import T, progress_shown_by
from edgefg.settings.split import SplitSpec


def test_digests_of_readable_images(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    good, bad, gone = (root / "train" / "ant" / name for name in ("0.jpg", "1.jpg", "gone.jpg"))
    bad.write_bytes(b"")
    shown: list[tuple[str, int | None]] = []

    def bar(items: Iterable[T], description: str, total: int | None) -> Iterable[T]:
        shown.append((description, total))
        return items

    with progress_shown_by(bar):
        unreadable, digests = check_images(root, [good, bad, gone], skip_corrupt=True)
    assert digests == {good: hashlib.sha256(good.read_bytes()).hexdigest()}
    assert list(unreadable) == [bad, gone]
    assert unreadable[gone] == "train/ant/gone.jpg: No such file or directory"
    assert caplog.messages == [f"left out: {problem}" for problem in unreadable.values()]
    assert shown == [("checking images", 3)]
    with pytest.raises(DataError, match=r"data: 1 of 2 images cannot be used: train/ant/1\.jpg is empty"):
        check_images(root, [good, bad])


def test_three_problems_are_named() -> None:
    message = corrupt_message([f"{i}.jpg is empty" for i in range(5)], 9)
    assert message.startswith(
        "5 of 9 images cannot be used: 0.jpg is empty; 1.jpg is empty; 2.jpg is empty and 2 more;"
    )


def test_other_data() -> None:
    require_same_data(Path("birds"), "a" * 64, "a" * 64, "artifact", "restore it")
    with pytest.raises(DataError, match=r"birds has changed since the artifact .* \(fingerprint a{12}, not b{12}\)"):
        require_same_data(Path("birds"), "a" * 64, "b" * 64, "artifact", "restore it")


def test_a_file_in_two_splits(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copy(root / "train" / "ant" / "0.jpg", root / "train" / "ant" / "again.jpg")
    load_dataset(root)
    assert not caplog.messages
    shutil.copy(root / "train" / "ant" / "0.jpg", root / "test" / "ant" / "7.jpg")
    load_dataset(root)
    (message,) = caplog.messages
    assert message.startswith("1 images are also in another split (first: test/ant/7.jpg is train/ant/0.jpg), so its")


def test_groups_in_several_splits(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_dataset(root, SplitSpec(group=r"^(\w+)/"))
    assert not caplog.messages
    load_dataset(root, SplitSpec(group=r"(\d+)\.jpg"))
    (message,) = caplog.messages
    assert message.startswith("2 groups have images in several splits (first: '0' in train and val and test), so")
    with pytest.raises(DataError, match=r"does not match 'train/ant/0\.jpg'"):
        load_dataset(root, SplitSpec(group="camera-(.)"))
