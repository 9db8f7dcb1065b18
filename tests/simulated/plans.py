"""Fixtures: plans of the simulated device, the INT8 graph that they are built of, and the device itself."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edgefg.artifact.hashes import file_info
from edgefg.artifact.manifest import encode_manifest, manifest_path, read_manifest
from edgefg.export.tensorrt.build import build_engine
from edgefg.preprocess import InputSpec, UInt8Array, prepare
from tests.conftest import TINY
from tests.export.quantizing import quantize_tensorrt
from tests.simulated.books import Books
from tests.simulated.install import simulated_device


@pytest.fixture(scope="session")
def qdq(birds: tuple[tuple[str, ...], list[UInt8Array]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny network as the all-int8 QDQ graph for TensorRT, as an artifact; its folder must stay as it is."""
    folder = tmp_path_factory.mktemp("int8")
    shutil.copytree(TINY / "onnx", folder, dirs_exist_ok=True)
    model = folder / "model.onnx"
    spec = InputSpec(height=64, width=64)
    quantize_tensorrt(TINY / "onnx" / "model.onnx", model, np.stack([prepare(frame, spec) for frame in birds[1]]))
    manifest = read_manifest(TINY / "onnx" / "model.onnx")
    assert manifest.golden is not None
    manifest = msgspec.structs.replace(
        manifest,
        precision="int8",
        files=tuple(file_info(folder / file.name) for file in manifest.files),
        golden=msgspec.structs.replace(manifest.golden, logits=10.0, parent_logits=10.0),
    )
    manifest_path(model).write_bytes(encode_manifest(manifest))
    return model


@pytest.fixture(scope="session")
def built(qdq: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plan that the simulated device builds of it, its ONNX beside it; the folder must stay as it is."""
    folder = tmp_path_factory.mktemp("built")
    with simulated_device(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFG_CACHE", "")
        return Path(build_engine([qdq], out=folder).plan)


@pytest.fixture
def plan(built: Path, tmp_path: Path) -> Path:
    """A copy of that plan's folder, which the test may spoil."""
    shutil.copytree(built.parent, tmp_path / "plan")
    return tmp_path / "plan" / built.name


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEFG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def device(cache: Path) -> Iterator[Books]:
    with simulated_device() as books:
        yield books
        books.assert_clean()
