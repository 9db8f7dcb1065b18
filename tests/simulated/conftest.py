"""Fixtures of the simulation's own tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.simulated.books import Books
from tests.simulated.install import simulated_device
from tests.simulated.rig import Rig, make_plan


@pytest.fixture
def books() -> Iterator[Books]:
    with simulated_device() as found:
        yield found


@pytest.fixture
def rig(books: Books) -> Rig:
    return Rig(books, make_plan())
