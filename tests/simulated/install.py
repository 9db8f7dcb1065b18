"""Puts the simulated modules where the real ones would be found: in this process, or in a child's PYTHONPATH."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from tests.simulated.books import VARIABLE, Books, describe_config
from tests.simulated.cuda_runtime import SimulatedCuda, make_module
from tests.simulated.pycuda_driver import make_driver
from tests.simulated.tensorrt_builder import add_builder
from tests.simulated.tensorrt_engine import (
    VERSIONS,
    DataType,
    Engines,
    ICudaEngine,
    IExecutionContext,
    ILogger,
    Runtime,
    TensorIOMode,
)

SITE = Path(__file__).parent / "site"
ROOT = Path(__file__).parents[2]


def make_tensorrt(books: Books, cuda: SimulatedCuda) -> types.ModuleType:
    """Return the simulated tensorrt of the configured major version."""
    version = VERSIONS[books.config.major]
    module = types.ModuleType("tensorrt")
    module.__version__ = ".".join(map(str, version))  # type: ignore[attr-defined]
    site = Engines(books, cuda, version)
    names: dict[str, Any] = {
        "Runtime": type("Runtime", (Runtime,), {"site": site}),
        "nptype": lambda dtype: np.dtype(dtype.value).type,
    }
    for kind in (ILogger, ICudaEngine, IExecutionContext, DataType, TensorIOMode):
        names[kind.__name__] = kind
    for name, value in names.items():
        setattr(module, name, value)
    add_builder(module, books, version)
    return module


@functools.cache
def modules_of_process() -> dict[str, types.ModuleType]:
    """Return this process's simulated modules: what the shims in ``site/`` re-export."""
    return _modules(Books(), pycuda=True)


def _modules(books: Books, *, pycuda: bool) -> dict[str, types.ModuleType]:
    runtime = make_module(books)
    cuda: SimulatedCuda = runtime.simulated  # type: ignore[attr-defined]
    bindings = types.ModuleType("cuda.bindings")
    bindings.__version__, bindings.runtime = "13.0.0", runtime  # type: ignore[attr-defined]
    package = types.ModuleType("cuda")
    package.bindings = bindings  # type: ignore[attr-defined]
    found = {"cuda": package, "cuda.bindings": bindings, "cuda.bindings.runtime": runtime}
    if pycuda:
        driver = make_driver(books, cuda)
        outer = types.ModuleType("pycuda")
        outer.driver, outer.VERSION_TEXT = driver, "2026.1"  # type: ignore[attr-defined]
        found |= {"pycuda": outer, "pycuda.driver": driver}
    return {"tensorrt": make_tensorrt(books, cuda), **found}


@contextlib.contextmanager
def simulated_device(*, pycuda: bool = False, **config: Any) -> Iterator[Books]:
    """Install the simulation, in this process and for its children; yields the books of this process.

    Args:
        pycuda: PyCUDA is installed, and cuda-python is not.
        config: fields of `tests.simulated.books.Config`.
    """
    path = os.pathsep.join([str(SITE), str(ROOT)])
    with mock.patch.dict(os.environ, {VARIABLE: describe_config(**config), "PYTHONPATH": path}):
        books = Books()
        modules: dict[str, Any] = dict(_modules(books, pycuda=pycuda))
        if pycuda:
            modules |= {"cuda": None, "cuda.bindings": None, "cuda.bindings.runtime": None}
        with mock.patch.dict(sys.modules, modules):
            yield books
