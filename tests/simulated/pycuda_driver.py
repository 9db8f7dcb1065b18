"""Simulated pycuda.driver: the driver API as PyCUDA wraps it, over the same memory and streams as the runtime API.

Every call needs a context that is current on the calling thread; without one it fails, as in reality.
"""

from __future__ import annotations

import threading
import types
from typing import Any

import numpy as np

from tests.simulated.books import Allocation, Books
from tests.simulated.cuda_runtime import SimulatedCuda, cudaError_t, cudaMemcpyKind


class Error(Exception):
    pass


class LogicError(Error):
    pass


class PagelockedHostAllocation(np.ndarray):
    """Owns page-locked memory; views of it have it as ``base``."""

    allocation: Allocation
    owner: Any

    def free(self) -> None:
        self.owner.check(self.owner.cuda.cudaFreeHost(self.allocation.address))


class _Driver:
    def __init__(self, books: Books, cuda: SimulatedCuda) -> None:
        self.books, self.cuda = books, cuda
        self.local = threading.local()
        self.initialised = False
        self.attached = 0

    def stack(self) -> list[Any]:
        if not hasattr(self.local, "stack"):
            self.local.stack = []
        found: list[Any] = self.local.stack
        return found

    def current(self, what: str) -> None:
        if not self.stack():
            raise LogicError(f"{what} failed: invalid device context (simulated)")

    def check(self, result: tuple[Any, ...]) -> Any:
        error, *values = result
        if error:
            raise LogicError(f"simulated: {cudaError_t(error).name}")
        return values[0] if values else None


def make_driver(books: Books, cuda: SimulatedCuda) -> types.ModuleType:
    """Return the simulated module."""
    site = _Driver(books, cuda)
    module = types.ModuleType("pycuda.driver")
    for kind in (Error, LogicError):
        setattr(module, kind.__name__, kind)
    _add_device(module, site)
    _add_memory(module, site)
    return module


def _add_device(module: Any, site: _Driver) -> None:
    class Context:
        def push(self) -> None:
            site.stack().append(self)

        @staticmethod
        def pop() -> None:
            site.current("cuCtxPopCurrent")
            site.stack().pop()

        def detach(self) -> None:
            site.attached -= 1
            site.books.alive["primary contexts"] -= 1

    class Device:
        def __init__(self, index: int) -> None:
            if not site.initialised:
                raise LogicError("cuDeviceGet failed: initialization error (simulated)")
            self._index = index

        @staticmethod
        def count() -> int:
            found: int = site.check(site.cuda.cudaGetDeviceCount())
            return found

        def name(self) -> str:
            return site.books.config.gpu

        def compute_capability(self) -> tuple[int, int]:
            return site.books.config.compute_capability

        def total_memory(self) -> int:
            return site.books.config.memory

        def retain_primary_context(self) -> Context:
            site.attached += 1
            site.books.alive["primary contexts"] += 1
            return Context()

    def init() -> None:
        site.initialised = True

    module.Context, module.Device, module.init = Context, Device, init


def _add_memory(module: Any, site: _Driver) -> None:  # noqa: C901 (one closure a function of the API)
    class DeviceAllocation:
        def __init__(self, address: int) -> None:
            self._address = address

        def __int__(self) -> int:
            return self._address

        __index__ = __int__

        def free(self) -> None:
            site.current("cuMemFree")
            site.check(site.cuda.cudaFree(self._address))

    class Stream:
        def __init__(self, flags: int = 0) -> None:
            site.current("cuStreamCreate")
            self._stream = site.check(site.cuda.cudaStreamCreateWithFlags(flags))
            self.handle = int(self._stream)

        def synchronize(self) -> None:
            site.current("cuStreamSynchronize")
            site.check(site.cuda.cudaStreamSynchronize(self._stream))

        def __del__(self) -> None:
            if not site.stack():
                site.books.violation("a PyCUDA stream was dropped outside its context")
            site.cuda.cudaStreamDestroy(self._stream)

    def mem_get_info() -> tuple[int, int]:
        site.current("cuMemGetInfo")
        return site.cuda.cudaMemGetInfo()[1:]

    def mem_alloc(size: int) -> DeviceAllocation:
        site.current("cuMemAlloc")
        return DeviceAllocation(site.check(site.cuda.cudaMalloc(size)))

    def pagelocked_empty(shape: int, dtype: Any) -> Any:
        site.current("cuMemHostAlloc")
        address = site.check(site.cuda.cudaHostAlloc(shape * np.dtype(dtype).itemsize, 0))
        allocation = site.books.pinned[address]
        owner = np.ndarray.__new__(PagelockedHostAllocation, (allocation.size,), np.uint8, allocation.array)
        owner.allocation, owner.owner = allocation, site
        return _View(owner)

    def memcpy_htod_async(dest: Any, src: Any, stream: Any) -> None:
        site.current("cuMemcpyHtoDAsync")
        kind = cudaMemcpyKind.cudaMemcpyHostToDevice
        site.check(site.cuda.cudaMemcpyAsync(int(dest), src.ctypes.data, src.nbytes, kind, stream.handle))

    def memcpy_dtoh_async(dest: Any, src: Any, stream: Any) -> None:
        site.current("cuMemcpyDtoHAsync")
        kind = cudaMemcpyKind.cudaMemcpyDeviceToHost
        site.check(site.cuda.cudaMemcpyAsync(dest.ctypes.data, int(src), dest.nbytes, kind, stream.handle))

    for name, value in locals().items():
        if name not in ("module", "site"):
            setattr(module, name, value)


class _View(np.ndarray):
    """An array whose ``base`` is the allocation, as PyCUDA's are."""

    def __new__(cls, owner: PagelockedHostAllocation) -> Any:
        return np.ndarray.__new__(cls, owner.shape, np.uint8, owner)
