"""Fixtures of the command line's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.synthetic import write_dataset


@pytest.fixture(scope="package")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of four classes, with splits."""
    return write_dataset(tmp_path_factory.mktemp("birds"), classes=4, per_class=8, size=72, seed=5)


@pytest.fixture
def image(birds: Path) -> Path:
    """One of its test images."""
    return sorted((birds / "test").rglob("*.*g"))[0]
