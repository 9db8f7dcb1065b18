"""The runtime protocol, and which runtime opens which file.

A runtime is one inference engine around one loaded model. The core never asks which one it holds. It is named here by a
string and imported on first use, so that the core needs no vendor package.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol, cast

import numpy as np
import numpy.typing as npt

from edgefg.errors import RuntimeUnavailableError

EXACT_SUMS = ("session.x64quantprecision", "1")
"""ONNX Runtime's session option that sums 8-bit products exactly on x86 CPUs without VNNI too.

With 8-bit weights such a CPU then takes FP32's time; with 7-bit ones, depthwise ones excepted, it stays quicker.
"""
# file suffix → "module:Class"
RUNTIMES = {
    ".engine": "edgefg.runtimes.tensorrt:TensorRTRuntime",
    ".null": "edgefg.runtimes.null:NullRuntime",
    ".onnx": "edgefg.runtimes.onnxruntime:OnnxRuntime",
    ".plan": "edgefg.runtimes.tensorrt:TensorRTRuntime",
    ".xml": "edgefg.runtimes.openvino:OpenVINORuntime",
}


class Device(NamedTuple):
    """A GPU as its driver describes it."""

    name: str
    compute_capability: str
    """``major.minor``, for instance ``8.7``."""
    memory: int
    """Bytes."""


class TensorSpec(NamedTuple):
    """Shape and dtype of a network input or output."""

    shape: tuple[int | None, ...]
    """``[N, H, W, 3]``; N is None where the engine takes any batch."""
    dtype: str
    """NumPy's name of the element type."""


class Runtime(Protocol):
    """One inference engine around one loaded model; shared by threads."""

    @property
    def input(self) -> TensorSpec:
        """What `infer` takes: always ``uint8 [N, H, W, 3]``."""

    @property
    def version(self) -> str:
        """Name and version of the engine, for instance ``openvino 2026.4.1``."""

    def infer(self, batch: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return the logits, ``float32 [N, classes]``, of ``uint8 [N, H, W, 3]``, as an array of the caller's own."""

    def close(self) -> None:
        """Free the engine. Idempotent."""


class RuntimeClass(Protocol):
    """How a runtime is made: called with the model file, it loads the model or raises `RuntimeUnavailableError`."""

    def __call__(self, path: Path, *, threads: int | None, device: str | None) -> Runtime:
        """Load ``path`` for ``threads`` CPU threads (None: the engine's choice) on ``device`` (None: its default)."""


@contextlib.contextmanager
def without_telemetry() -> Iterator[None]:
    """Hide Intel's telemetry package while OpenVINO is imported: the import would send an event over the network.

    OpenVINO takes its own stub where the package is missing. A device in the field must not call home unasked.
    """
    name = "openvino_telemetry"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # Python's own way to make an import fail
    try:
        yield
    finally:
        sys.modules.pop(name, None)


def runtime_for(path: Path) -> str:
    """Return ``module:Class`` of the runtime that opens files of this suffix; nothing is imported or read.

    Raises:
        RuntimeUnavailableError: no runtime does.
    """
    suffix = path.suffix.lower()
    if path.is_dir():
        raise RuntimeUnavailableError(f"{path} is a folder; give the model file in it, for instance {path}/model.xml")
    if suffix == ".safetensors":
        raise RuntimeUnavailableError(f"{path.name} is a checkpoint; `edgefg export` makes an artifact of it")
    if suffix not in RUNTIMES:
        raise RuntimeUnavailableError(
            f"no runtime opens {path.name!r}: needed a model file that ends in {', '.join(RUNTIMES)}"
        )
    return RUNTIMES[suffix]


def describe_gpu(index: int = 0) -> tuple[Device, int]:
    """Return an NVIDIA GPU's description and its free memory in bytes.

    Raises:
        RuntimeUnavailableError: CUDA's bindings, the driver or the GPU are missing.
    """
    cuda = importlib.import_module("edgefg.runtimes.cuda").open_cuda(index)
    try:
        with cuda.current():
            return cuda.device(), cuda.free_memory()
    finally:
        cuda.close()


def load(path: Path, *, threads: int | None = None, device: str | None = None) -> Runtime:
    """Open a model file with the runtime that its suffix names.

    Raises:
        RuntimeUnavailableError: no runtime opens this suffix, its package is not installed, or it refused the model.
    """
    module, _, name = runtime_for(path).partition(":")
    runtime = cast(RuntimeClass, getattr(importlib.import_module(module), name))
    return runtime(path, threads=threads, device=device)
