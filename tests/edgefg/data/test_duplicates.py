from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from edgefg.data.duplicates import (
    MAX_DISTANCE,
    SIDE,
    Duplicates,
    find_duplicates,
    near_matches,
    perceptual_hash,
    thumbnail,
)
from edgefg.data.split import Sample
from edgefg.errors import DataError
from edgefg.preprocess import UInt8Array


def photograph(seed: int, size: int = 200) -> UInt8Array:
    """Soft random shades, as photographs have them."""
    noise = np.random.default_rng(seed).integers(0, 255, (9, 9, 3), np.uint8)
    return np.asarray(cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC), np.uint8)


def find(folder: Path, placed: dict[str, list[tuple[str, int]]]) -> Duplicates:
    splits = {split: [Sample(folder / name, label) for name, label in members] for split, members in placed.items()}
    paths = [path for members in splits.values() for path, _ in members]
    return find_duplicates(splits, {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths})


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for i in range(30):
        cv2.imwrite(str(tmp_path / f"{i}.jpg"), photograph(i))
    return tmp_path


def test_different_pictures_are_none(photos: Path) -> None:
    found = find(
        photos, {"train": [(f"{i}.jpg", i % 2) for i in range(20)], "test": [(f"{i}.jpg", 0) for i in range(20, 30)]}
    )
    assert found == Duplicates(across_splits=(), across_labels=(), within_split={"train": 0, "test": 0})


@pytest.mark.parametrize(
    "change",
    [
        lambda image: cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 40])[1], cv2.IMREAD_COLOR),
        lambda image: cv2.resize(image, (90, 110), interpolation=cv2.INTER_AREA),
        lambda image: cv2.resize(image, None, fx=2.0, fy=2.0),
        lambda image: np.clip(image * 1.15 + 8, 0, 255).astype(np.uint8),
        lambda image: image[3:-3, 3:-3],
    ],
    ids=["quality", "smaller", "larger", "brighter", "cropped"],
)
@pytest.mark.parametrize("flipped", [False, True])
def test_altered_copies_are_found(photos: Path, change: Callable[[UInt8Array], UInt8Array], flipped: bool) -> None:
    altered = change(photograph(3))
    cv2.imwrite(str(photos / "copy.png"), altered[:, ::-1] if flipped else altered)
    found = find(photos, {"train": [(f"{i}.jpg", 0) for i in range(30)], "test": [("copy.png", 0)]})
    (pair,) = found.across_splits
    assert (Path(pair.first).name, Path(pair.second).name) == ("3.jpg", "copy.png")
    assert (pair.splits, pair.exact, pair.mirrored) == (("train", "test"), False, flipped)
    assert 0.95 <= pair.correlation <= 1.0
    assert not found.across_labels


def test_same_files(photos: Path) -> None:
    """Of three alike the first pairs with the others; nothing is told twice as exact and as near."""
    for name in ("again.jpg", "once_more.jpg"):
        (photos / name).write_bytes((photos / "0.jpg").read_bytes())
    found = find(
        photos, {"train": [("0.jpg", 0), ("1.jpg", 1), ("again.jpg", 0)], "val": [], "test": [("once_more.jpg", 1)]}
    )
    assert found.within_split == {"train": 1, "val": 0, "test": 0}
    (pair,) = found.across_splits
    assert found.across_labels == (pair,)
    assert (pair.exact, pair.labels, pair.correlation) == (True, (0, 1), 1.0)


def test_one_picture_under_two_labels(photos: Path) -> None:
    cv2.imwrite(str(photos / "copy.png"), photograph(5)[:, ::-1])
    found = find(photos, {"train": [("5.jpg", 0), ("copy.png", 1), ("7.jpg", 1)]})
    assert not found.across_splits
    (pair,) = found.across_labels
    assert (pair.labels, pair.splits, pair.mirrored) == ((0, 1), ("train", "train"), True)
    assert found.within_split == {"train": 0}


def test_pictures_of_one_tone_are_not_compared(tmp_path: Path) -> None:
    for i in range(3):
        cv2.imwrite(str(tmp_path / f"{i}.png"), np.full((40, 40, 3), 50 * i, np.uint8))
    assert find(tmp_path, {"train": [("0.png", 0), ("1.png", 0)], "test": [("2.png", 0)]}).across_splits == ()


def test_the_hash_is_the_sign_of_the_low_cosines() -> None:
    """Against OpenCV's cosine transform; and the product of hashes counts the bits that differ."""
    small = np.stack([cv2.resize(photograph(i), (SIDE, SIDE), interpolation=cv2.INTER_AREA)[..., 0] for i in range(6)])
    hashes = perceptual_hash(small)
    bits = []
    for picture in small:
        low = cv2.dct(picture.astype(np.float32))[:8, :8].ravel()
        low[0] = 0
        # OpenCV's transform is orthonormal: the first row and column come out smaller by √2.
        scale = np.outer(*[np.r_[np.sqrt(2), np.ones(7)]] * 2).ravel()
        bits.append(low * scale > np.median(low * scale))
    expected = np.array(bits)
    np.testing.assert_array_equal(hashes > 0, expected)
    differing = (expected[0] != expected[1]).sum()
    assert hashes[0] @ hashes[1] == 64 - 2 * differing
    assert differing > MAX_DISTANCE


def test_blocks_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    base = np.stack([cv2.resize(photograph(i), (SIDE, SIDE), interpolation=cv2.INTER_AREA)[..., 0] for i in range(12)])
    small = np.concatenate([base, np.clip(base + rng.integers(-3, 4, base.shape), 0, 255).astype(np.uint8)])
    whole = list(near_matches(small))
    assert [(i, j, flipped) for i, j, flipped, _ in whole] == [(i, i + 12, False) for i in range(12)]
    monkeypatch.setattr("edgefg.data.duplicates._BLOCK", 5)
    monkeypatch.setattr("edgefg.data.duplicates._CHUNK", 1)
    assert [match[:3] for match in sorted(near_matches(small))] == [match[:3] for match in whole]


def test_an_image_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*gone\.jpg"):
        thumbnail(tmp_path / "gone.jpg")
