"""The fixtures of the export tests, for artifacts that are measured, packaged and verified."""

from __future__ import annotations

from tests.benchmarks.conftest import *  # noqa: F403
from tests.export.conftest import *  # noqa: F403
