"""Small images for the tests of data sets."""

from __future__ import annotations

import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest


def write_images(folder: Path, count: int) -> None:
    """Write noise images ``0.jpg``, ``1.jpg``, …, different in every folder."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(zlib.crc32("/".join(folder.parts[-2:]).encode()))
    for i in range(count):
        cv2.imwrite(str(folder / f"{i}.jpg"), rng.integers(0, 255, (24, 24, 3), np.uint8))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes, ant and bee, with 4, 2 and 2 images each in train, val and test."""
    for split, count in (("train", 4), ("val", 2), ("test", 2)):
        for name in ("ant", "bee"):
            write_images(tmp_path / "data" / split / name, count)
    return tmp_path / "data"


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """Two classes, ant and bee, with 20 images each and no splits."""
    for name in ("ant", "bee"):
        write_images(tmp_path / "flat" / name, 20)
    return tmp_path / "flat"
