"""Simulated cuda.bindings.runtime: CUDA's runtime API as its documentation describes it, on host memory.

Work is enqueued and carried out only when its stream is waited for, so that whoever forgets to wait reads old data.
"""

from __future__ import annotations

import enum
import itertools
import threading
import types
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.simulated.books import Allocation, Books

_handles = itertools.count(0x10000, 0x100)
Work = Callable[[], None]


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorInvalidDevice = 101
    cudaErrorInvalidResourceHandle = 400
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901
    cudaErrorUnknown = 999


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToHost = 0
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class cudaStreamCaptureMode(enum.IntEnum):
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1
    cudaStreamCaptureModeRelaxed = 2


class _Handle:
    """A stream, a captured graph or an executable one."""

    def __init__(self) -> None:
        self.number = next(_handles)
        self.work: list[Work] = []
        self.holds: list[Allocation] = []

    def __int__(self) -> int:
        return self.number


class Stream(_Handle):
    def __init__(self) -> None:
        super().__init__()
        self.capture: _Handle | None = None
        self.capturing_thread = 0
        self.invalid = False
        self.on_done: list[Work] = []

    def add(self, work: Work, memory: list[Allocation]) -> None:
        """Enqueue work, or record it while a capture is on."""
        if self.capture is not None:
            self.capture.work.append(work)
            self.capture.holds += memory
        else:
            self.work.append(work)
            self.holds += memory
            for allocation in memory:
                allocation.pending += 1


class SimulatedCuda:
    """The functions of the API, over one set of books."""

    def __init__(self, books: Books) -> None:
        self.books = books
        self._local = threading.local()

    # Errors and devices

    def cudaGetErrorName(self, error: int) -> tuple[Any, bytes]:
        return cudaError_t.cudaSuccess, cudaError_t(error).name.encode()

    def cudaGetErrorString(self, error: int) -> tuple[Any, bytes]:
        return cudaError_t.cudaSuccess, f"simulated: {cudaError_t(error).name}".encode()

    def cudaGetLastError(self) -> tuple[Any]:
        return (cudaError_t(self.books.sticky),)

    def cudaGetDeviceCount(self) -> tuple[Any, int | None]:
        error = self.books.config.driver_error
        return (cudaError_t(error), None) if error else (cudaError_t.cudaSuccess, self.books.config.devices)

    def cudaSetDevice(self, device: int) -> tuple[Any]:
        if not 0 <= device < self.books.config.devices:
            return (cudaError_t.cudaErrorInvalidDevice,)
        return (cudaError_t(self.books.fails("cudaSetDevice")),)

    def cudaGetDeviceProperties(self, device: int) -> tuple[Any, Any]:
        found = self.books.config
        major, minor = found.compute_capability
        name = found.gpu.encode() + b"\0" * 8
        properties = types.SimpleNamespace(name=name, major=major, minor=minor, totalGlobalMem=found.memory)
        return cudaError_t.cudaSuccess, properties

    def cudaMemGetInfo(self) -> tuple[Any, int, int]:
        taken = sum(allocation.size for allocation in self.books.device.values())
        return cudaError_t.cudaSuccess, self.books.config.free - taken, self.books.config.memory

    # Memory

    def cudaMalloc(self, size: int) -> tuple[Any, int | None]:
        return self._allocate("cudaMalloc", size, self.books.device)

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[Any, int | None]:
        return self._allocate("cudaHostAlloc", size, self.books.pinned)

    def cudaFree(self, address: int) -> tuple[Any]:
        return self._free("cudaFree", int(address), self.books.device)

    def cudaFreeHost(self, address: int) -> tuple[Any]:
        return self._free("cudaFreeHost", int(address), self.books.pinned)

    def _allocate(self, call: str, size: int, where: dict[int, Allocation]) -> tuple[Any, int | None]:
        error = self._forbidden_in_capture(call) or self.books.fails(call)
        if error:
            return cudaError_t(error), None
        allocation = Allocation(size)
        with self.books.lock:
            where[allocation.address] = allocation
        return cudaError_t.cudaSuccess, allocation.address

    def _free(self, call: str, address: int, where: dict[int, Allocation]) -> tuple[Any]:
        error = self._forbidden_in_capture(call) or self.books.fails(call)
        if error and error != self.books.sticky:
            return (cudaError_t(error),)
        with self.books.lock:
            allocation = where.pop(address, None)
        if allocation is None:
            self.books.violation(f"{call} of {address:#x}, which is not allocated")
            return (cudaError_t.cudaErrorInvalidValue,)
        if allocation.pending:
            self.books.violation(f"{call} of memory that enqueued work still uses")
        if allocation.graphs:
            self.books.violation(f"{call} of memory that a graph still uses")
        return (cudaError_t(error),)  # after an error that sticks, the context's memory is gone all the same

    # Streams

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, Any]:
        error = self.books.fails("cudaStreamCreateWithFlags")
        if error:
            return cudaError_t(error), None
        stream = Stream()
        with self.books.lock:
            self.books.streams[int(stream)] = stream
        return cudaError_t.cudaSuccess, stream

    def cudaStreamDestroy(self, stream: Any) -> tuple[Any]:
        with self.books.lock:
            found = self.books.streams.pop(int(stream), None)
        if found is None:
            self.books.violation("cudaStreamDestroy of a stream that is not alive")
            return (cudaError_t.cudaErrorInvalidResourceHandle,)
        if found.work or found.capture is not None:
            self.books.violation("cudaStreamDestroy of a stream with work enqueued")
        return (cudaError_t(self.books.sticky),)

    def stream_of(self, handle: Any, what: str) -> Stream | None:
        """Return a living stream; note where it is none."""
        stream = self.books.streams.get(int(handle))
        if stream is None:
            self.books.violation(
                f"{what} on {'the default stream' if not int(handle) else 'a stream that is not alive'}"
            )
        return stream

    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: Any, stream: Any) -> tuple[Any]:
        books, error = self.books, self.books.fails("cudaMemcpyAsync")
        if error:
            return (cudaError_t(error),)
        inward = kind == cudaMemcpyKind.cudaMemcpyHostToDevice
        target = books.find(books.device if inward else books.pinned, int(dst), count)
        source = books.find(books.pinned if inward else books.device, int(src), count)
        if target is None or source is None:
            books.violation(f"{cudaMemcpyKind(kind).name} of {count} bytes out of bounds, freed, or not page-locked")
            return (cudaError_t.cudaErrorInvalidValue,)
        found = self.stream_of(stream, "cudaMemcpyAsync")
        if found is None:
            return (cudaError_t.cudaErrorInvalidResourceHandle,)
        to = target.array[int(dst) - target.address :][:count]
        start = source.array[int(src) - source.address :][:count]
        found.add(lambda: np.copyto(to, start), [target, source])
        return (cudaError_t.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: Any) -> tuple[Any]:
        found = self.stream_of(stream, "cudaStreamSynchronize")
        if found is None:
            return (cudaError_t.cudaErrorInvalidResourceHandle,)
        if found.capture is not None:
            found.invalid = True
            return (cudaError_t.cudaErrorStreamCaptureUnsupported,)
        error = self.books.fails("cudaStreamSynchronize")
        if not error:
            for work in found.work:
                work()
        for done in found.on_done:
            done()
        for allocation in found.holds:
            allocation.pending -= 1
        found.work, found.holds, found.on_done = [], [], []
        return (cudaError_t(error),)

    # Graphs

    def cudaStreamBeginCapture(self, stream: Any, mode: Any) -> tuple[Any]:
        found = self.stream_of(stream, "cudaStreamBeginCapture")
        if found is None or found.capture is not None or found.work:
            self.books.violation("cudaStreamBeginCapture on a stream that is busy, capturing or gone")
            return (cudaError_t.cudaErrorInvalidValue,)
        error = self.books.fails("cudaStreamBeginCapture")
        if error:
            return (cudaError_t(error),)
        found.capture, found.invalid, found.capturing_thread = _Handle(), False, threading.get_ident()
        self._local.capturing = found
        return (cudaError_t.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: Any) -> tuple[Any, Any]:
        found = self.stream_of(stream, "cudaStreamEndCapture")
        if found is None or found.capture is None:
            self.books.violation("cudaStreamEndCapture without a capture")
            return cudaError_t.cudaErrorInvalidValue, None
        graph, found.capture, self._local.capturing = found.capture, None, None
        error = self.books.fails("cudaStreamEndCapture")
        if found.invalid or error:
            return cudaError_t(error or 901), None
        self.books.graphs.add(int(graph))
        return cudaError_t.cudaSuccess, graph

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[Any, Any]:
        error = self.books.fails("cudaGraphInstantiate")
        if error:
            return cudaError_t(error), None
        executable = _Handle()
        executable.work, executable.holds = list(graph.work), list(graph.holds)
        with self.books.lock:
            self.books.graphs.add(int(executable))
            for allocation in executable.holds:
                allocation.graphs += 1
        return cudaError_t.cudaSuccess, executable

    def cudaGraphDestroy(self, graph: Any) -> tuple[Any]:
        return self._destroy(graph)

    def cudaGraphExecDestroy(self, graph: Any) -> tuple[Any]:
        with self.books.lock:
            for allocation in graph.holds:
                allocation.graphs -= 1
        return self._destroy(graph)

    def _destroy(self, graph: Any) -> tuple[Any]:
        with self.books.lock:
            if int(graph) not in self.books.graphs:
                self.books.violation("a graph that is not alive was destroyed")
                return (cudaError_t.cudaErrorInvalidValue,)
            self.books.graphs.remove(int(graph))
        return (cudaError_t(self.books.sticky),)

    def cudaGraphLaunch(self, graph: Any, stream: Any) -> tuple[Any]:
        error = self.books.fails("cudaGraphLaunch")
        found = self.stream_of(stream, "cudaGraphLaunch")
        if error or found is None:
            return (cudaError_t(error or 400),)
        if int(graph) not in self.books.graphs:
            self.books.violation("cudaGraphLaunch of a graph that is not alive")
            return (cudaError_t.cudaErrorInvalidValue,)
        for work in graph.work:
            found.add(work, [])
        return (cudaError_t.cudaSuccess,)

    def _forbidden_in_capture(self, call: str) -> int:
        capturing: Stream | None = getattr(self._local, "capturing", None)
        if capturing is None:
            return 0
        capturing.invalid = True
        self.books.violation(f"{call} while the same thread captures a graph")
        return int(cudaError_t.cudaErrorStreamCaptureUnsupported)


def make_module(books: Books) -> types.ModuleType:
    """Return the simulated module."""
    module = types.ModuleType("cuda.bindings.runtime")
    api = SimulatedCuda(books)
    for name in dir(api):
        if name.startswith("cuda"):
            setattr(module, name, getattr(api, name))
    for kind in (cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode):
        setattr(module, kind.__name__, kind)
    module.cudaStreamNonBlocking, module.cudaHostAllocDefault = 1, 0  # type: ignore[attr-defined]
    module.simulated = api  # type: ignore[attr-defined]
    return module
