"""Puts the simulated modules where the real ones would be found: in this process, or in a child's PYTHONPATH.

>>> with simulated_device(major=11, faults=[Fault("cudaMalloc", at=2, error=2)]) as books:  # doctest: +SKIP
...     books.assert_clean()
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from tests.simulated import tensorrt_config, tensorrt_context, tensorrt_core, tensorrt_engine, tensorrt_parser
from tests.simulated.books import VARIABLE, Books, Fault, describe_config
from tests.simulated.cuda_runtime import make_module
from tests.simulated.device import Device
from tests.simulated.plan_format import VERSIONS
from tests.simulated.pycuda_driver import make_driver
from tests.simulated.tensorrt_builder import Builder, platform
from tests.simulated.tensorrt_engine import Runtime, Site
from tests.simulated.tensorrt_names import enums_of
from tests.simulated.tensorrt_parser import OnnxParser

__all__ = ["ROOT", "SITE", "Fault", "modules_of_process", "simulated_device"]

SITE = Path(__file__).parent / "site"
ROOT = Path(__file__).parents[2]
_NAMES = ("tensorrt", "cuda", "cuda.bindings", "cuda.bindings.runtime", "pycuda", "pycuda.driver")
_SHARED = {
    tensorrt_core: "DataType Dims IHostMemory ILogger Logger TensorFormat TensorIOMode TensorLocation nptype volume",
    tensorrt_config: "IBuilderConfig IOptimizationProfile IProgressMonitor ITimingCache",
    tensorrt_context: "IExecutionContext",
    tensorrt_engine: "ICudaEngine",
    tensorrt_parser: "INetworkDefinition ITensor ParserError",
}


def make_tensorrt(device: Device) -> types.ModuleType:
    """Return the simulated tensorrt of the configured major version."""
    major = device.books.config.major
    site, enums = Site(device, VERSIONS[major]), enums_of(major)
    extra = platform(fast_fp16=True, fast_int8=True, tf32=True) if major == 10 else {}
    names: dict[str, Any] = {
        name: getattr(module, name) for module, listed in _SHARED.items() for name in listed.split()
    }
    names |= {alias: getattr(tensorrt_core.DataType, name) for alias, name in tensorrt_core.ALIASES.items()}
    names |= enums
    for kind, more in ((Runtime, {}), (OnnxParser, {}), (Builder, {"enums": enums, **extra})):
        names[kind.__name__] = type(kind.__name__, (kind,), {"__slots__": (), "site": site, **more})
    module = types.ModuleType("tensorrt", "Simulated TensorRT.")
    vars(module).update(names)
    module.__version__ = ".".join(map(str, site.version))  # type: ignore[attr-defined]
    module.simulated = True  # type: ignore[attr-defined]
    return module


def _modules(books: Books) -> dict[str, types.ModuleType | None]:
    """Return each name's simulated module; None where its import is to fail."""
    device = Device(books)
    found: dict[str, types.ModuleType | None] = dict.fromkeys(_NAMES)
    found["tensorrt"] = make_tensorrt(device)
    if books.config.pycuda:
        outer = types.ModuleType("pycuda", "Simulated PyCUDA.")
        outer.driver, outer.VERSION_TEXT, outer.VERSION = make_driver(device), "2026.1", (2026, 1)  # type: ignore[attr-defined]
        outer.__path__ = []
        return found | {"pycuda": outer, "pycuda.driver": outer.driver}
    runtime = make_module(device)
    bindings = types.ModuleType("cuda.bindings", "Simulated cuda-python.")
    bindings.__version__, bindings.runtime, bindings.__path__ = "13.0.0", runtime, []  # type: ignore[attr-defined]
    package = types.ModuleType("cuda", "Simulated cuda-python.")
    package.bindings, package.__path__ = bindings, []  # type: ignore[attr-defined]
    return found | {"cuda": package, "cuda.bindings": bindings, "cuda.bindings.runtime": runtime}


@functools.cache
def modules_of_process() -> dict[str, types.ModuleType | None]:
    """Return this process's simulated modules: what the shims in ``site/`` re-export."""
    return _modules(Books(child=True))


def install_in_child(*names: str) -> None:
    """Put the simulated modules of these names where the import system finds them; for the shims in ``site/``."""
    modules = modules_of_process()
    if modules[names[0]] is None:
        raise ModuleNotFoundError(f"No module named {names[0]!r} (this simulated device has none)", name=names[0])
    for name in names:
        sys.modules[name] = modules[name]  # type: ignore[assignment]


@contextlib.contextmanager
def simulated_device(**config: Any) -> Iterator[Books]:
    """Install the simulation, in this process and for its children; yields the books of this process.

    Args:
        config: fields of `tests.simulated.books.Config`; ``pycuda=True`` installs PyCUDA and no cuda-python.
    """
    with tempfile.TemporaryDirectory(prefix="simulated-", ignore_cleanup_errors=True) as state:
        path = os.pathsep.join(filter(None, [str(SITE), str(ROOT), os.environ.get("PYTHONPATH", "")]))
        variables = {VARIABLE: describe_config(**{"state": state, **config}), "PYTHONPATH": path}
        with mock.patch.dict(os.environ, variables):
            books = Books()
            with _installed(_modules(books)):
                yield books


@contextlib.contextmanager
def _installed(modules: dict[str, types.ModuleType | None]) -> Iterator[None]:
    """Replace these modules alone: what else is imported meanwhile stays, since NumPy and the like load once only."""
    before = {name: sys.modules.get(name, atexit) for name in modules}  # atexit: was not there at all
    sys.modules.update(modules)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name, module in before.items():
            if module is atexit:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module
