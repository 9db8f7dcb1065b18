"""Fixtures of the search's tests: a context whose steps do nothing costly."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgefg.data import ImageDataset, load_dataset
from edgefg.export.search.context import SearchContext
from tests.export.search.searching import context_of


@pytest.fixture(scope="session")
def birds_data(two_birds: Path) -> ImageDataset:
    return load_dataset(two_birds)


@pytest.fixture
def context(birds_data: ImageDataset, tmp_path: Path) -> SearchContext:
    """The context of a search that has not begun."""
    (tmp_path / "out").mkdir()
    return context_of(tmp_path / "out", birds_data)
