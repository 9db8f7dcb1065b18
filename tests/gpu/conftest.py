"""Tests that need an NVIDIA GPU, and the report that they write: `make test-gpu`, on the device.

Without a GPU every one is skipped, with the reason. They ask for numpy, pytest and edgefg[tensorrt] alone; where ONNX
Runtime is installed too, they compare with it. EDGEFG_GPU_MODELS names ONNX artifacts of your own, separated by colons.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgefg
from edgefg.errors import RuntimeUnavailableError
from edgefg.export.build_plan import Here
from edgefg.export.builder import describe
from edgefg.export.to_tensorrt import BuildReport, build_engine
from edgefg.manifest import read_manifest
from edgefg.preprocess import UInt8Array
from tests.conftest import TINY

_REPORT = Path("gpu-report.json")
_figures: dict[str, Any] = {}
_outcomes: dict[str, str] = {}


@pytest.fixture(scope="session")
def here() -> Here:
    """The GPU and TensorRT; skips where one is missing."""
    try:
        found = describe()
    except RuntimeUnavailableError as exc:
        pytest.skip(str(exc))
    _figures["device"] = {name: getattr(found, name) for name in found.__struct_fields__}
    return found


@pytest.fixture(scope="session")
def models(here: Here, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Copies of the ONNX artifacts to build from, by precision."""
    given = os.environ.get("EDGEFG_GPU_MODELS")
    paths = [Path(name) for name in given.split(":")] if given else [TINY / "onnx" / "model.onnx"]
    copies = {}
    for path in paths:
        folder = tmp_path_factory.mktemp("artifact")
        shutil.copytree(path.parent, folder, dirs_exist_ok=True)
        copies[read_manifest(path).precision] = folder / path.name
    return copies


@pytest.fixture(scope="session")
def plans(models: dict[str, Path]) -> dict[str, BuildReport]:
    """A plan of every model, built here and now."""
    built = {}
    for precision, model in models.items():
        start = time.perf_counter()
        built[precision] = build_engine([model], rebuild=True)
        _figures[f"build of {precision}, s"] = round(time.perf_counter() - start, 1)
    return built


@pytest.fixture(scope="session")
def frames() -> list[UInt8Array]:
    """Sixty-four frames of several sizes."""
    generator = np.random.default_rng(0)
    sizes = generator.integers(40, 400, (64, 2)).tolist()
    rows = [np.linspace(0, 255, h)[:, None, None] * np.ones((1, w, 3)) for h, w in sizes]
    return [np.clip(row + generator.normal(0, 40, row.shape), 0, 255).astype(np.uint8) for row in rows]


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """Figures of a test, which go into the report."""
    found: dict[str, Any] = {}
    yield found
    _figures[request.node.name] = found


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if "tests/gpu/" in report.nodeid and (report.when == "call" or report.outcome != "passed"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr or "")[-2000:]
        _outcomes[report.nodeid.rpartition("::")[2]] = f"{report.outcome} {reason}".strip()


def pytest_sessionfinish() -> None:
    if "device" in _figures:  # something ran on a GPU
        head = {"edgefg": edgefg.__version__, "machine": platform.platform(), "python": platform.python_version()}
        _REPORT.write_text(json.dumps({**head, "outcomes": _outcomes, "figures": _figures}, indent=2) + "\n")
        print(f"\nreport: {_REPORT.resolve()}")
