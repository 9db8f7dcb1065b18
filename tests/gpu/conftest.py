"""Tests that need an NVIDIA GPU, and the report that they write: `make test-gpu`, on the device.

Without a GPU every one is skipped, with the reason. They ask for numpy, pytest and edgefg[tensorrt] alone; where ONNX
Runtime is installed too, they compare with it. The tiny network is built in FP32, FP16, INT8 and with a free batch;
EDGEFG_GPU_MODELS names ONNX artifacts of your own in its place, separated by colons.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest

import edgefg
from edgefg.artifact.hashes import file_info
from edgefg.artifact.manifest import encode_manifest, manifest_path, read_manifest
from edgefg.errors import RuntimeUnavailableError
from edgefg.export.tensorrt.build import BuildReport, build_engine
from edgefg.export.tensorrt.builder import describe
from edgefg.export.tensorrt.worker import BuildConfig, BuildDevice
from edgefg.preprocess import UInt8Array
from tests.conftest import TINY

FREE_BATCH = "fp32, free batch"
_TINY = ("onnx", "onnx-fp16", "onnx-int8")
_REPORT = Path("gpu-report.json")
_figures: dict[str, Any] = {}
_outcomes: dict[str, str] = {}


class Model(NamedTuple):
    """An ONNX artifact, and how it is built."""

    path: Path
    settings: BuildConfig = BuildConfig()


@pytest.fixture(scope="session")
def here() -> BuildDevice:
    """The GPU and TensorRT; skips where one is missing."""
    try:
        found = describe()
    except RuntimeUnavailableError as exc:
        pytest.skip(str(exc))
    _figures["device"] = {name: getattr(found, name) for name in found.__struct_fields__}
    return found


@pytest.fixture(scope="session")
def models(here: BuildDevice, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """Copies of the ONNX artifacts to build from, by precision."""
    given = os.environ.get("EDGEFG_GPU_MODELS")
    paths = [Path(name) for name in given.split(":")] if given else [TINY / name / "model.onnx" for name in _TINY]
    copies: dict[str, Model] = {}
    for path in paths:
        folder = tmp_path_factory.mktemp("artifact")
        shutil.copytree(path.parent, folder, dirs_exist_ok=True)
        precision = read_manifest(path).precision
        copies[f"{precision} of {path}" if precision in copies else precision] = Model(folder / path.name)
    if not given:
        copies[FREE_BATCH] = Model(_free_batch(tmp_path_factory.mktemp("artifact")), BuildConfig(batches=(1, 4, 16)))
    return copies


def _free_batch(folder: Path) -> Path:
    """Copy the tiny network of free batch, with the golden set of its like: the repository has it once."""
    free, fixed = (read_manifest(TINY / name / "model.onnx") for name in ("onnx-dynamic", "onnx"))
    assert fixed.golden is not None
    shutil.copytree(TINY / "onnx-dynamic", folder, dirs_exist_ok=True)
    proof = Path(shutil.copy(TINY / "onnx" / fixed.golden.file, folder))
    manifest = msgspec.structs.replace(free, golden=fixed.golden, files=(*free.files, file_info(proof)))
    manifest_path(folder / free.model).write_bytes(encode_manifest(manifest))
    return folder / free.model


@pytest.fixture(scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the plans out of the user's cache: they are built before what a single test sets holds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFG_CACHE", str(tmp_path_factory.getbasetemp() / "edgefg-cache"))
        yield


@pytest.fixture(scope="session")
def plans(models: dict[str, Model], own_cache: None) -> dict[str, BuildReport]:
    """A plan of every model, built here and now."""
    built = {}
    for name, model in models.items():
        start = time.perf_counter()
        built[name] = build_engine([model.path], settings=model.settings, rebuild=True)
        _figures[f"build of {name}, s"] = round(time.perf_counter() - start, 1)
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
