"""The runtime protocol, and which runtime opens which file.

A runtime is one inference engine around one loaded model. The core never asks which one it holds. Runtimes are imported
by name, on first use, and import their vendor's package in the constructor, so that the core needs none of them.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import NamedTuple, Protocol, cast

import numpy as np
import numpy.typing as npt

from edgefg.errors import RuntimeUnavailableError

RUNTIMES = {
    ".engine": "edgefg.runtimes.tensorrt:TensorRTRuntime",
    ".null": "edgefg.runtimes.null:NullRuntime",
    ".onnx": "edgefg.runtimes.onnxruntime:OnnxRuntime",
    ".plan": "edgefg.runtimes.tensorrt:TensorRTRuntime",
    ".xml": "edgefg.runtimes.openvino:OpenVINORuntime",
}
"""File suffix to ``module:Class``. Only the runtime of the file at hand is imported, so that devices start quickly."""


class TensorSpec(NamedTuple):
    """Shape and dtype of a network input or output."""

    shape: tuple[int | None, ...]
    """``[N, H, W, 3]``; N is None if the engine takes any batch."""
    dtype: str
    """NumPy's name of the element type."""


class Runtime(Protocol):
    """One inference engine around one loaded model; shared by threads."""

    @property
    def input(self) -> TensorSpec:
        """Input of `infer`: always ``uint8 [N, H, W, 3]``."""

    @property
    def version(self) -> str:
        """Name and version of the engine, for instance ``openvino 2026.4.1``."""

    def infer(self, batch: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return the logits, ``float32 [N, classes]``, of ``uint8 [N, H, W, 3]``, in an array that the caller owns.

        Raises:
            InferenceError: the engine failed.
        """

    def close(self) -> None:
        """Free the engine. Idempotent."""


class RuntimeClass(Protocol):
    """Class of a runtime: its properties and its constructor."""

    companions: tuple[str, ...]
    """Suffixes of the files that belong to a model, beside it and with its stem, for instance ``(".bin",)``."""
    extra: str
    """Extra of edgefg that installs the engine; empty if nothing has to be installed."""
    int8_remedy: str
    """Advice if an INT8 artifact does not reproduce on another CPU; empty if nothing is known."""

    def __call__(self, path: Path, *, threads: int | None, device: str | None) -> Runtime:
        """Load ``path`` on ``device`` (None: the engine's default) with ``threads`` CPU threads (None: its choice).

        Raises:
            RuntimeUnavailableError: the engine is not installed, or refused the model.
        """


def runtime_for(path: Path) -> RuntimeClass:
    """Return the runtime that opens a model file. Neither the file nor the engine's package is opened.

    Raises:
        RuntimeUnavailableError: no runtime opens it.
    """
    if path.is_dir():
        raise RuntimeUnavailableError(f"{path} is a folder; give the model file in it, for instance {path}/model.xml")
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        raise RuntimeUnavailableError(f"{path.name} is a checkpoint; `edgefg export` makes an artifact of it")
    if suffix not in RUNTIMES:
        raise RuntimeUnavailableError(
            f"no runtime opens {path.name!r}; give a model file that ends in {', '.join(RUNTIMES)}"
        )
    module, _, name = RUNTIMES[suffix].partition(":")
    return cast(RuntimeClass, getattr(importlib.import_module(module), name))


def engines() -> dict[str, list[str]]:
    """Return the suffixes that each installable engine opens, by its extra of edgefg. No engine is imported."""
    found: dict[str, list[str]] = {}
    for suffix in RUNTIMES:
        if extra := runtime_for(Path(f"model{suffix}")).extra:
            found.setdefault(extra, []).append(suffix)
    return found


def model_files(model: Path) -> tuple[Path, ...]:
    """Return the model file and the files that belong to it, for instance ``model.xml`` and ``model.bin``."""
    companions = runtime_for(model).companions if model.suffix.lower() in RUNTIMES else ()
    return (model, *map(model.with_suffix, companions))


def load(path: Path, *, threads: int | None = None, device: str | None = None) -> Runtime:
    """Open a model file with the runtime that opens its suffix.

    Raises:
        RuntimeUnavailableError: no runtime opens this suffix, its package is not installed, or it refused the model.
    """
    return runtime_for(path)(path, threads=threads, device=device)
