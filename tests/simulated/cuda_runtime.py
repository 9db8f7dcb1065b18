"""Simulated cuda.bindings.runtime (cuda-python 12.6 to 13): functions that return (error, results…) over `Device`."""

from __future__ import annotations

import enum
import types
from typing import Any

import numpy as np

from tests.simulated.books import Books
from tests.simulated.codes import ERRORS
from tests.simulated.device import Device

cudaError_t = enum.IntEnum("cudaError_t", {name: code for code, (name, _) in ERRORS.items()})  # type: ignore[misc]
cudaMemcpyKind = enum.IntEnum(  # type: ignore[misc]
    "cudaMemcpyKind",
    {f"cudaMemcpy{way}": i for i, way in enumerate(["HostToHost", "HostToDevice", "DeviceToHost", "DeviceToDevice"])}
    | {"cudaMemcpyDefault": 4},
)
cudaStreamCaptureMode = enum.IntEnum(  # type: ignore[misc]
    "cudaStreamCaptureMode",
    {f"cudaStreamCaptureMode{mode}": i for i, mode in enumerate(["Global", "ThreadLocal", "Relaxed"])},
)
cudaStreamCaptureStatus = enum.IntEnum(  # type: ignore[misc]
    "cudaStreamCaptureStatus",
    {f"cudaStreamCaptureStatus{s}": i for i, s in enumerate(["None", "Active", "Invalidated"])},
)
CONSTANTS = {
    "cudaStreamDefault": 0,
    "cudaStreamNonBlocking": 1,
    "cudaHostAllocDefault": 0,
    "cudaHostAllocPortable": 1,
    "cudaHostAllocMapped": 2,
    "cudaHostAllocWriteCombined": 4,
}
_BY_CODE = {code: cudaError_t(code) for code in ERRORS}


class _Handle:
    """As cuda-python's handles: an address with a type, equal by value, a number by ``int()`` only."""

    __slots__ = ("_number",)

    def __init__(self, init_value: int = 0) -> None:
        self._number = int(init_value)

    def __int__(self) -> int:
        return self._number

    __index__ = __int__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Handle) and self._number == other._number

    def __hash__(self) -> int:
        return hash(self._number)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._number:#x} (simulated)>"


class cudaStream_t(_Handle):
    __slots__ = ()


class cudaGraph_t(_Handle):
    __slots__ = ()


class cudaGraphExec_t(_Handle):
    __slots__ = ()


class cudaDeviceProp:
    """What cudaGetDeviceProperties tells of a device; the simulation knows these fields only."""

    def __init__(self, books: Books) -> None:
        self.name = books.config.gpu.encode()
        self.major, self.minor = books.config.compute_capability
        self.totalGlobalMem = books.config.memory
        self.integrated, self.unifiedAddressing, self.multiProcessorCount = 1, 1, 16


def _answer(code: int, *values: Any) -> tuple[Any, ...]:
    return (_BY_CODE.get(code) or cudaError_t(code), *values)


def _address(given: Any) -> int:
    """Take None, a number or an object with the buffer protocol, as cuda-python does."""
    if given is None:
        return 0
    if hasattr(given, "__index__"):
        return int(given)
    try:
        return np.frombuffer(given, np.uint8).ctypes.data
    except TypeError as exc:
        raise TypeError(
            f"Provided argument is of type {type(given)} but expected Type None, int or object with Buffer Protocol"
        ) from exc


def _size(given: Any) -> int:
    if not hasattr(given, "__index__"):
        raise TypeError("an integer is required")
    if given < 0:
        raise OverflowError("can't convert negative value to size_t")
    return int(given)


class SimulatedCuda:
    """The functions of the API, over one device."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._books = device.books

    def _result(self, code: int, *values: Any) -> tuple[Any, ...]:
        if code:
            self._device.thread.error = code
            values = tuple(None for _ in values)
        return _answer(code, *values)

    # Errors

    def cudaGetErrorName(self, error: int) -> tuple[Any, bytes]:
        return cudaError_t(0), ERRORS.get(int(error), ("unrecognized error code", ""))[0].encode()

    def cudaGetErrorString(self, error: int) -> tuple[Any, bytes]:
        return cudaError_t(0), ERRORS.get(int(error), ("", "unrecognized error code"))[1].encode()

    def cudaGetLastError(self) -> tuple[Any]:
        """Return this thread's last error and forget it, unless it sticks."""
        code, self._device.thread.error = self._device.thread.error, self._books.sticky
        return _answer(code or self._books.sticky)

    def cudaPeekAtLastError(self) -> tuple[Any]:
        return _answer(self._device.thread.error or self._books.sticky)

    # Devices

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        return self._result(self._device.enter("cudaGetDeviceCount"), self._books.config.devices)

    def cudaSetDevice(self, device: int) -> tuple[Any, ...]:
        return self._result(self._device.set_device(device))

    def cudaGetDevice(self) -> tuple[Any, ...]:
        return self._result(self._device.enter("cudaGetDevice"), self._device.thread.device or 0)

    def cudaGetDeviceProperties(self, device: int) -> tuple[Any, ...]:
        error = self._device.enter("cudaGetDeviceProperties")
        if not error and not 0 <= device < self._books.config.devices:
            error = 101
        return self._result(error, cudaDeviceProp(self._books))

    def cudaDriverGetVersion(self) -> tuple[Any, ...]:
        return self._result(0, 0 if self._books.config.driver_error == 35 else self._books.config.cuda)

    def cudaRuntimeGetVersion(self) -> tuple[Any, ...]:
        return self._result(0, self._books.config.cuda)

    def cudaDeviceSynchronize(self) -> tuple[Any, ...]:
        return self._result(self._device.synchronize_device())

    # Memory

    def cudaMemGetInfo(self) -> tuple[Any, ...]:
        return self._result(*self._device.memory_info())

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        return self._result(*self._device.allocate("cudaMalloc", _size(size), pinned=False))

    def cudaFree(self, devPtr: Any) -> tuple[Any, ...]:
        return self._result(self._device.release("cudaFree", _address(devPtr), pinned=False))

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[Any, ...]:
        return self._result(*self._device.allocate("cudaHostAlloc", _size(size), pinned=True))

    def cudaMallocHost(self, size: int) -> tuple[Any, ...]:
        return self._result(*self._device.allocate("cudaMallocHost", _size(size), pinned=True))

    def cudaFreeHost(self, ptr: Any) -> tuple[Any, ...]:
        return self._result(self._device.release("cudaFreeHost", _address(ptr), pinned=True))

    def cudaMemcpyAsync(self, dst: Any, src: Any, count: int, kind: int, stream: Any) -> tuple[Any, ...]:
        target, source = _address(dst), _address(src)
        return self._result(self._device.copy(target, source, _size(count), int(kind), _address(stream)))

    # Streams

    def cudaStreamCreate(self) -> tuple[Any, ...]:
        return self._stream("cudaStreamCreate", 0)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        return self._stream("cudaStreamCreateWithFlags", int(flags))

    def _stream(self, call: str, flags: int) -> tuple[Any, ...]:
        code, stream = self._device.create_stream(call, flags)
        return self._result(code, stream and cudaStream_t(stream.handle))

    def cudaStreamDestroy(self, stream: Any) -> tuple[Any, ...]:
        return self._result(self._device.destroy_stream(_address(stream)))

    def cudaStreamSynchronize(self, stream: Any) -> tuple[Any, ...]:
        return self._result(self._device.synchronize(_address(stream)))

    def cudaStreamQuery(self, stream: Any) -> tuple[Any, ...]:
        return _answer(self._device.query(_address(stream)))

    # Captures and graphs

    def cudaStreamBeginCapture(self, stream: Any, mode: int) -> tuple[Any, ...]:
        return self._result(self._device.begin_capture(_address(stream), int(mode)))

    def cudaStreamEndCapture(self, stream: Any) -> tuple[Any, ...]:
        code, graph = self._device.end_capture(_address(stream))
        return self._result(code, graph and cudaGraph_t(graph.handle))

    def cudaStreamIsCapturing(self, stream: Any) -> tuple[Any, ...]:
        code = self._device.enter("cudaStreamIsCapturing")
        found = self._device.stream_of(_address(stream), "cudaStreamIsCapturing")
        if found is None:
            return self._result(code or 400, None)
        status = 0 if found.capture is None else 2 if found.capture.invalid else 1
        return self._result(code, cudaStreamCaptureStatus(status))

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[Any, ...]:
        code, made = self._device.instantiate(_address(graph))
        return self._result(code, made and cudaGraphExec_t(made.handle))

    def cudaGraphLaunch(self, graphExec: Any, stream: Any) -> tuple[Any, ...]:
        return self._result(self._device.launch(_address(graphExec), _address(stream)))

    def cudaGraphDestroy(self, graph: Any) -> tuple[Any, ...]:
        return self._result(self._device.destroy_graph("cudaGraphDestroy", _address(graph), executable=False))

    def cudaGraphExecDestroy(self, graphExec: Any) -> tuple[Any, ...]:
        return self._result(self._device.destroy_graph("cudaGraphExecDestroy", _address(graphExec), executable=True))


def make_module(device: Device) -> types.ModuleType:
    """Return the simulated module."""
    module = types.ModuleType("cuda.bindings.runtime")
    api = SimulatedCuda(device)
    names: dict[str, Any] = {name: getattr(api, name) for name in dir(api) if name.startswith("cuda")}
    for kind in (cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode, cudaStreamCaptureStatus, cudaDeviceProp):
        names[kind.__name__] = kind
    for handle in (cudaStream_t, cudaGraph_t, cudaGraphExec_t):
        names[handle.__name__] = handle
    vars(module).update(names | CONSTANTS)
    module.__doc__ = "Simulated cuda.bindings.runtime."
    return module
