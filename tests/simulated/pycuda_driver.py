"""Simulated pycuda.driver (2026.1, read off its source): the driver API as PyCUDA wraps it, over `Device`.

Every call needs a context that is current on the calling thread. What PyCUDA allocates remembers the context that was
current; it can only be freed while that context is current, or on the thread that made the context, and leaks, with a
warning, anywhere else. PyCUDA wraps no graphs.
"""

from __future__ import annotations

import threading
import types
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.simulated import codes
from tests.simulated.device import DEVICE_TO_HOST, HOST_TO_DEVICE, Device


class Error(Exception):
    pass


class MemoryError(Error):
    pass


class LogicError(Error):
    pass


class LaunchError(Error):
    pass


class RuntimeError(Error):
    pass


ERRORS = (Error, MemoryError, LogicError, LaunchError, RuntimeError)
_CLASSES: dict[int, type[Error]] = {2: MemoryError, 100: RuntimeError, 600: RuntimeError, 702: LaunchError}
_CLASSES |= {719: LaunchError, 999: Error}


def check(call: str, code: int) -> None:
    """Raise what PyCUDA raises for a driver's error."""
    if code:
        text = codes.ERRORS.get(code, ("", "unknown error"))[1]
        raise _CLASSES.get(code, LogicError)(f"{call} failed: {text} (simulated)")


class _Stack:
    """A thread's stack of contexts. PyCUDA aborts the process where a thread ends before its stack is empty."""

    def __init__(self, site: Site) -> None:
        self.contexts: list[Context] = []
        self._books = site.device.books

    def __del__(self) -> None:
        if self.contexts:
            self._books.violation("a thread ended with a PyCUDA context on its stack: PyCUDA aborts the process")


class Site:
    """What all objects of one simulated PyCUDA share."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.initialised = False
        self._local = threading.local()

    @property
    def stack(self) -> list[Context]:
        if not hasattr(self._local, "stack"):
            self._local.stack = _Stack(self)
        found: list[Context] = self._local.stack.contexts
        return found

    def current(self, call: str) -> Context:
        """Return the calling thread's context."""
        if not self.stack:
            self.device.books.violation(f"{call} on a thread without a current context")
            check(call, codes.INVALID_CONTEXT)
        return self.stack[-1]

    def sync(self, pushed: int) -> None:
        """Let the books, and the runtime API that TensorRT uses, follow the stack."""
        self.device.books.count("current contexts", pushed)
        self.device.thread.device = self.stack[-1].index if self.stack else None


class Context:
    """A primary context, from `retain_primary_context`."""

    def __init__(self, site: Site, index: int) -> None:
        self._site, self.index, self._valid = site, index, True
        self.thread = threading.get_ident()
        site.device.books.count("primary contexts", 1)

    handle = property(lambda self: 0xC0DE00 + self.index)

    @property
    def valid(self) -> bool:
        return self._valid

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Context) and other.index == self.index

    def __hash__(self) -> int:
        return hash(self.index)

    def push(self) -> None:
        if not self._valid:
            self._site.device.books.violation("Context.push of a context that was detached")
            check("cuCtxPushCurrent", codes.INVALID_CONTEXT)
        self._site.stack.append(self)
        self._site.sync(1)

    def detach(self) -> None:
        if not self._valid:
            self._site.device.books.violation("Context.detach of a context that was detached")
            check("context::detach", codes.INVALID_CONTEXT)
        if self._site.stack and self._site.stack[-1] is self:
            self._site.stack.pop()
            self._site.sync(-1)
        elif self.thread != threading.get_ident():
            self._site.device.books.violation("Context.detach on another thread than retained it: PyCUDA leaks it")
            self._valid = False
            return
        self._valid = False
        self._site.device.books.count("primary contexts", -1)

    def __del__(self) -> None:
        if self._valid:
            self.detach()


class Owned:
    """What lives in the context that was current when it was made."""

    def __init__(self, site: Site, call: str) -> None:
        self._site, self._context = site, site.current(call)
        self._alive = True

    def _release(self, what: str, free: Callable[[], int]) -> None:
        """Free where PyCUDA can; else warn and leak, as it does."""
        if not self._alive:
            self._site.device.books.violation(f"{what}::free of what was freed")
            check(f"{what}::free", codes.INVALID_HANDLE)
        self._alive = False
        stack, context = self._site.stack, self._context
        if not context.valid:
            self._site.device.books.violation(f"a {what} outlived its context")
            return
        if not stack or stack[-1] is not context:
            if context.thread != threading.get_ident():
                self._site.device.books.violation(f"a {what} was freed outside its context: PyCUDA leaks it")
                warnings.warn(f"{what} in out-of-thread context could not be cleaned up", UserWarning, stacklevel=3)
                return
            context.push()
            free()
            stack.pop()
            self._site.sync(-1)
            return
        free()  # PyCUDA writes an error of a clean-up to standard error and goes on


class DeviceAllocation(Owned):
    """Device memory."""

    def __init__(self, site: Site, size: int) -> None:
        super().__init__(site, "cuMemAlloc")
        self._alive = False
        code, address = site.device.allocate("cudaMalloc", size, pinned=False)
        check("cuMemAlloc", code)
        self._address, self._alive = address or 0, True

    def __int__(self) -> int:
        return self._address

    __index__ = __int__

    def free(self) -> None:
        device = self._site.device
        self._release("device_allocation", lambda: device.release("cudaFree", self._address, pinned=False))

    def __del__(self) -> None:
        if getattr(self, "_alive", False):
            self.free()


class PagelockedHostAllocation(Owned):
    """Page-locked memory; the ``base`` of the array that `pagelocked_empty` returns."""

    def __init__(self, site: Site, shape: tuple[int, ...], dtype: np.dtype, order: str) -> None:
        super().__init__(site, "cuMemHostAlloc")
        self._alive = False
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        code, address = site.device.allocate("cudaHostAlloc", size, pinned=True)
        check("cuMemHostAlloc", code)
        self._address, self._alive = address or 0, True
        strides = np.empty(shape, dtype, order=order).strides if order == "F" else None  # type: ignore[call-overload]
        self.__array_interface__ = {
            "version": 3,
            "shape": shape,
            "typestr": dtype.str,
            "strides": strides,
            "data": (self._address, False),
        }

    def free(self) -> None:
        device = self._site.device
        self._release("pagelocked_host_allocation", lambda: device.release("cudaFreeHost", self._address, pinned=True))

    def __del__(self) -> None:
        if getattr(self, "_alive", False):
            self.free()


class Stream(Owned):
    """A stream; destroyed with its last reference."""

    site: Site

    def __init__(self, flags: int = 0) -> None:
        self._alive = False
        super().__init__(self.site, "cuStreamCreate")
        self._alive = False
        code, stream = self.site.device.create_stream("cudaStreamCreateWithFlags", int(flags))
        check("cuStreamCreate", code)
        assert stream is not None
        self.handle, self._alive = stream.handle, True

    def synchronize(self) -> None:
        self._site.current("cuStreamSynchronize")
        check("cuStreamSynchronize", self._site.device.synchronize(self.handle))

    def is_done(self) -> bool:
        self._site.current("cuStreamQuery")
        code = self._site.device.query(self.handle)
        if code != codes.NOT_READY:
            check("cuStreamQuery", code)
        return code == 0

    def __del__(self) -> None:
        if getattr(self, "_alive", False):
            device = self._site.device
            self._release("stream", lambda: device.destroy_stream(self.handle))


def make_driver(device: Device) -> types.ModuleType:
    """Return the simulated module."""
    site = Site(device)
    module = types.ModuleType("pycuda.driver")
    names: dict[str, Any] = {kind.__name__: kind for kind in (*ERRORS, DeviceAllocation, PagelockedHostAllocation)}
    names |= _devices(site) | _memory(site)
    names["Stream"] = type("Stream", (Stream,), {"site": site})
    names["HostAllocation"] = PagelockedHostAllocation
    vars(module).update(names)
    module.site = site  # type: ignore[attr-defined]
    return module


def _contexts(site: Site) -> type[Context]:
    class DriverContext(Context):
        @staticmethod
        def pop() -> None:
            site.current("context::pop")
            site.stack.pop()
            site.sync(-1)

        @staticmethod
        def synchronize() -> None:
            site.current("cuCtxSynchronize")
            check("cuCtxSynchronize", site.device.synchronize_device())

        @staticmethod
        def get_current() -> Context | None:
            return site.stack[-1] if site.stack else None

    return DriverContext


def _devices(site: Site) -> dict[str, Any]:
    books, context = site.device.books, _contexts(site)

    def initialised(call: str) -> None:
        if not site.initialised:
            books.violation(f"{call} before pycuda.driver.init()")
            check(call, codes.NOT_INITIALISED)

    class CudaDevice:
        def __init__(self, index: int) -> None:
            initialised("cuDeviceGet")
            if not 0 <= index < books.config.devices:
                check("cuDeviceGet", codes.INVALID_DEVICE)
            self._index = index

        @staticmethod
        def count() -> int:
            initialised("cuDeviceGetCount")
            check("cuDeviceGetCount", site.device.enter("cudaGetDeviceCount"))
            return books.config.devices

        def name(self) -> str:
            return books.config.gpu

        def compute_capability(self) -> tuple[int, int]:
            return books.config.compute_capability

        def total_memory(self) -> int:
            return books.config.memory

        def retain_primary_context(self) -> Context:
            check("cuDevicePrimaryCtxRetain", site.device.enter("cuDevicePrimaryCtxRetain"))
            return context(site, self._index)

    def init(flags: int = 0) -> None:
        check("cuInit", site.device.books.config.driver_error)
        site.initialised = True

    return {
        "init": init,
        "Device": CudaDevice,
        "Context": context,
        "get_version": lambda: (books.config.cuda // 1000, books.config.cuda % 1000 // 10, 0),
        "get_driver_version": lambda: books.config.cuda,
    }


def _memory(site: Site) -> dict[str, Any]:
    device = site.device

    def mem_get_info() -> tuple[int, int]:
        site.current("cuMemGetInfo")
        code, free, total = device.memory_info()
        check("cuMemGetInfo", code)
        return free, total

    def mem_alloc(bytes: int) -> DeviceAllocation:
        return DeviceAllocation(site, int(bytes))

    def pagelocked_empty(shape: Any, dtype: Any, order: str = "C", mem_flags: int = 0) -> np.ndarray:
        sizes = (int(shape),) if hasattr(shape, "__index__") else tuple(int(size) for size in shape)
        return np.asarray(PagelockedHostAllocation(site, sizes, np.dtype(dtype), order))

    def memcpy_htod_async(dest: Any, src: Any, stream: Any = None) -> None:
        site.current("cuMemcpyHtoDAsync")
        address, size = _buffer(src, writable=False)
        handle = stream.handle if stream is not None else 0
        check("cuMemcpyHtoDAsync", device.copy(int(dest), address, size, HOST_TO_DEVICE, handle))

    def memcpy_dtoh_async(dest: Any, src: Any, stream: Any = None) -> None:
        site.current("cuMemcpyDtoHAsync")
        address, size = _buffer(dest, writable=True)
        handle = stream.handle if stream is not None else 0
        check("cuMemcpyDtoHAsync", device.copy(address, int(src), size, DEVICE_TO_HOST, handle))

    return {name: value for name, value in locals().items() if name not in ("site", "device")}


def _buffer(given: Any, *, writable: bool) -> tuple[int, int]:
    """Return address and size of a contiguous buffer."""
    array = np.asarray(given) if isinstance(given, np.ndarray) else np.frombuffer(given, np.uint8)
    if not (array.flags.c_contiguous or array.flags.f_contiguous):
        raise BufferError("ndarray is not contiguous")
    if writable and not array.flags.writeable:
        raise BufferError("buffer source array is read-only")
    return array.ctypes.data, array.nbytes
