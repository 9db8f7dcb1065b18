"""Notices of the builds, for every test of this folder."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _notices(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "edgefg")
