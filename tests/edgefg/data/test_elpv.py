"""Demo data."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from edgefg.data.elpv import LEVELS, write_elpv


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package with 40 tiny images instead of 2,624, ten of each level, half of them of each cell type."""
    utils = pytest.importorskip("elpv_dataset.utils")
    images = np.random.default_rng(0).integers(0, 255, (40, 8, 8), np.uint8)
    probabilities = [i % 4 / 3 for i in range(40)]
    kinds = ["mono" if i % 8 < 4 else "poly" for i in range(40)]
    monkeypatch.setattr(utils, "load_dataset", lambda: (images, probabilities, kinds))


@pytest.mark.usefixtures("package")
def test_class_folders(tmp_path: Path) -> None:
    out = write_elpv(tmp_path / "data")
    files = sorted(out.rglob("*.png"))
    assert len(files) == 40
    assert {file.relative_to(out).parts[0] for file in files} == {"train", "val", "test"}
    assert Counter(file.parent.name for file in files) == dict.fromkeys(LEVELS, 10)
    assert {(file.parent.name, file.stem.partition("-")[2]) for file in out.glob("train/*/*")} == {
        (level, kind) for level in LEVELS for kind in ("mono", "poly")
    }
    (out / "train" / "mark").touch()
    assert write_elpv(out) == out
    assert (out / "train" / "mark").exists()
