"""CUDA for the TensorRT runtime and builder: device memory, pinned memory, streams, copies, graphs.

There are two implementations of one interface: cuda-python, which NVIDIA maintains, and PyCUDA, for Jetson images that
have nothing else. Both use the device's primary context, so that they can share a process with other users of CUDA.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgefg.artifact.plan import GpuInfo
from edgefg.errors import RuntimeUnavailableError, one_line

Bytes = npt.NDArray[np.uint8]
_ADVICE = "run `edgefg doctor` to see what to install"
_thread = threading.local()
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING, which PyCUDA does not name


class CudaError(RuntimeError):
    """A CUDA call failed; the message names the call and CUDA's error."""


class Cuda(Protocol):
    """One GPU. Call every method except `current` and `close` inside ``with cuda.current():``, on any thread."""

    version: str
    """Name and version of the binding, for instance ``cuda-python 13.4.4``."""
    graphs: bool
    """Whether `capture` works."""

    def current(self) -> contextlib.AbstractContextManager[None]:
        """Make the device current in the calling thread."""

    def device(self) -> GpuInfo:
        """Describe the device."""

    def free_memory(self) -> int:
        """Return the device memory that is free, in bytes."""

    def allocate(self, size: int) -> Any:
        """Return device memory of ``size`` bytes; ``int()`` of it is its address."""

    def free(self, memory: Any) -> None:
        """Free device memory."""

    def pinned(self, size: int) -> Bytes:
        """Return page-locked host memory, ``uint8 [size]``."""

    def free_pinned(self, memory: Bytes) -> None:
        """Free page-locked memory; no view of it may be used after that."""

    def stream(self) -> Any:
        """Return a new stream that does not wait for the default stream."""

    def handle(self, stream: Any) -> int:
        """Return a stream's handle for TensorRT."""

    def free_stream(self, stream: Any) -> None:
        """Destroy a stream."""

    def copy_in(self, target: Any, source: Bytes, stream: Any) -> None:
        """Enqueue a copy of all of ``source``, page-locked, to device memory."""

    def copy_out(self, target: Bytes, source: Any, stream: Any) -> None:
        """Enqueue a copy from device memory that fills ``target``, page-locked."""

    def synchronize(self, stream: Any) -> None:
        """Wait until the stream is idle."""

    def capture(self, stream: Any, work: Callable[[], None]) -> Any:
        """Record what ``work`` enqueues on ``stream`` as a graph, without running it."""

    def launch(self, graph: Any, stream: Any) -> None:
        """Enqueue a graph."""

    def free_graph(self, graph: Any) -> None:
        """Destroy a graph."""

    def close(self) -> None:
        """Release the device. Called outside `current`."""


def open_cuda(index: int = 0) -> Cuda:
    """Open a GPU by cuda-python, or by PyCUDA if cuda-python is not installed.

    Raises:
        RuntimeUnavailableError: neither is installed, or there is no driver or no such GPU.
    """
    problems: dict[str, Exception] = {}
    for name, binding in (("cuda-python", CudaPython), ("PyCUDA", PyCuda)):
        try:
            opened = binding(index)
        except Exception as exc:  # a binding that is newer than the driver: the other one may work
            problems[name] = exc
        else:
            problems.clear()  # its traceback would keep the callers' frames alive, and the runtime with them
            return opened
    broken = {name: exc for name, exc in problems.items() if not isinstance(exc, ImportError)}
    if not broken:
        raise RuntimeUnavailableError(
            f"neither cuda-python nor PyCUDA is installed, and TensorRT needs one of them; {_ADVICE}"
        ) from problems["cuda-python"]
    name, problem = next(iter(broken.items()))
    raise RuntimeUnavailableError(f"GPU {index} cannot be used: {name}: {one_line(problem)}; {_ADVICE}") from problem


def describe_gpu(index: int = 0) -> tuple[GpuInfo, int]:
    """Return an NVIDIA GPU's description and its free memory in bytes.

    Raises:
        RuntimeUnavailableError: CUDA's bindings, the driver or the GPU are missing.
    """
    cuda = open_cuda(index)
    try:
        with cuda.current():
            return cuda.device(), cuda.free_memory()
    finally:
        cuda.close()


class CudaPython:
    """CUDA's runtime API by cuda-python."""

    graphs = True

    def __init__(self, index: int) -> None:
        from cuda.bindings import __version__, runtime

        self._rt = runtime
        self._index = index
        self.version = f"cuda-python {__version__}"
        count = self._check(self._rt.cudaGetDeviceCount(), "looking for GPUs")
        if index >= count:
            raise CudaError(f"there are {count} GPUs, numbered from 0")
        self._select()

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Make the device current in the calling thread; it stays current, unless this is nested in another `current`.

        Restoring the device of before would create a context, hundreds of MiB, on a GPU that the thread may never have
        used.
        """
        entered: list[CudaPython] = vars(_thread).setdefault("entered", [])
        self._select()
        entered.append(self)
        try:
            yield
        finally:
            entered.pop()
            # A runtime that is collected in the middle of another one's call frees its memory there.
            if entered and entered[-1]._index != self._index:
                entered[-1]._select()

    def device(self) -> GpuInfo:
        """Describe the device."""
        found = self._check(self._rt.cudaGetDeviceProperties(self._index), "reading the GPU's properties")
        name = found.name.split(b"\0")[0].decode("utf-8", "replace")
        return GpuInfo(name, f"{found.major}.{found.minor}", int(found.totalGlobalMem))

    def free_memory(self) -> int:
        """Return the device memory that is free, in bytes."""
        free, _ = self._check(self._rt.cudaMemGetInfo(), "asking for free memory")
        return int(free)

    def allocate(self, size: int) -> int:
        """Return the address of device memory."""
        return int(self._check(self._rt.cudaMalloc(size), f"allocating {size} bytes on the GPU"))

    def free(self, memory: int) -> None:
        """Free device memory."""
        self._check(self._rt.cudaFree(memory), "freeing GPU memory")

    def pinned(self, size: int) -> Bytes:
        """Return page-locked host memory."""
        address = int(
            self._check(
                self._rt.cudaHostAlloc(size, self._rt.cudaHostAllocDefault), f"page-locking {size} bytes of memory"
            )
        )
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def free_pinned(self, memory: Bytes) -> None:
        """Free page-locked memory."""
        self._check(self._rt.cudaFreeHost(memory.ctypes.data), "freeing page-locked memory")

    def stream(self) -> Any:
        """Return a new stream."""
        return self._check(self._rt.cudaStreamCreateWithFlags(self._rt.cudaStreamNonBlocking), "creating a stream")

    def handle(self, stream: Any) -> int:
        """Return the stream's address."""
        return int(stream)

    def free_stream(self, stream: Any) -> None:
        """Destroy a stream."""
        self._check(self._rt.cudaStreamDestroy(stream), "destroying a stream")

    def copy_in(self, target: int, source: Bytes, stream: Any) -> None:
        """Enqueue a copy to the device."""
        kind = self._rt.cudaMemcpyKind.cudaMemcpyHostToDevice
        done = self._rt.cudaMemcpyAsync(target, source.ctypes.data, source.nbytes, kind, stream)
        self._check(done, "copying to the GPU")

    def copy_out(self, target: Bytes, source: int, stream: Any) -> None:
        """Enqueue a copy from the device."""
        kind = self._rt.cudaMemcpyKind.cudaMemcpyDeviceToHost
        done = self._rt.cudaMemcpyAsync(target.ctypes.data, source, target.nbytes, kind, stream)
        self._check(done, "copying from the GPU")

    def synchronize(self, stream: Any) -> None:
        """Wait for the stream."""
        self._check(self._rt.cudaStreamSynchronize(stream), "waiting for the GPU")

    def capture(self, stream: Any, work: Callable[[], None]) -> Any:
        """Record a graph; calls of other threads do not disturb it."""
        mode = self._rt.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._check(self._rt.cudaStreamBeginCapture(stream, mode), "beginning to capture a graph")
        try:
            work()
        except BaseException:
            # Left open, the capture would swallow whatever comes later on this stream.
            _, graph = self._rt.cudaStreamEndCapture(stream)
            if graph is not None and int(graph):
                self._rt.cudaGraphDestroy(graph)
            self._rt.cudaGetLastError()
            raise
        graph = self._check(self._rt.cudaStreamEndCapture(stream), "capturing a graph")
        try:
            return self._check(self._rt.cudaGraphInstantiate(graph, 0), "instantiating a graph")
        finally:
            self._check(self._rt.cudaGraphDestroy(graph), "destroying a captured graph")

    def launch(self, graph: Any, stream: Any) -> None:
        """Enqueue a graph."""
        self._check(self._rt.cudaGraphLaunch(graph, stream), "launching a graph")

    def free_graph(self, graph: Any) -> None:
        """Destroy a graph."""
        self._check(self._rt.cudaGraphExecDestroy(graph), "destroying a graph")

    def close(self) -> None:
        """Do nothing: other code in this process may use the primary context, which ends with the process."""

    def _select(self) -> None:
        self._check(self._rt.cudaSetDevice(self._index), f"selecting GPU {self._index}")

    def _check(self, result: tuple[Any, ...], doing: str) -> Any:
        """Return the values of a call's result (error, values…): none, one, or several. Raises `CudaError`."""
        error, *values = result
        if int(error):
            # Not kept for the next caller that asks, TensorRT for instance; errors that stick stay all the same.
            self._rt.cudaGetLastError()
            name, text = (ask(error)[1].decode() for ask in (self._rt.cudaGetErrorName, self._rt.cudaGetErrorString))
            raise CudaError(f"{doing}: {name} ({text})")
        return values[0] if len(values) == 1 else tuple(values)


class PyCuda:
    """CUDA's driver API by PyCUDA, which has no graphs."""

    graphs = False

    def __init__(self, index: int) -> None:
        from pycuda import VERSION_TEXT, driver

        self._driver = driver
        self.version = f"pycuda {VERSION_TEXT}"
        self._driver.init()
        count = self._driver.Device.count()
        if index >= count:
            raise CudaError(f"there are {count} GPUs, numbered from 0")
        self._device = self._driver.Device(index)
        self._context = self._device.retain_primary_context()

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Push the primary context onto the calling thread's stack, and pop it again."""
        with self._errors():
            self._context.push()
        try:
            yield
        finally:
            self._driver.Context.pop()

    def device(self) -> GpuInfo:
        """Describe the device."""
        major, minor = self._device.compute_capability()
        return GpuInfo(self._device.name(), f"{major}.{minor}", int(self._device.total_memory()))

    def free_memory(self) -> int:
        """Return the device memory that is free, in bytes."""
        with self._errors():
            return int(self._driver.mem_get_info()[0])

    def allocate(self, size: int) -> Any:
        """Return device memory."""
        with self._errors():
            return self._driver.mem_alloc(size)

    def free(self, memory: Any) -> None:
        """Free device memory."""
        with self._errors():
            memory.free()

    def pinned(self, size: int) -> Bytes:
        """Return page-locked host memory."""
        with self._errors():
            memory: Bytes = self._driver.pagelocked_empty(size, np.uint8)
            return memory

    def free_pinned(self, memory: Bytes) -> None:
        """Free page-locked memory."""
        allocation: Any = memory.base
        with self._errors():
            allocation.free()

    def stream(self) -> Any:
        """Return a new stream."""
        with self._errors():
            return self._driver.Stream(_NON_BLOCKING)

    def handle(self, stream: Any) -> int:
        """Return the stream's address."""
        return int(stream.handle)

    def free_stream(self, stream: Any) -> None:
        """Do nothing: PyCUDA destroys a stream with its last reference."""

    def copy_in(self, target: Any, source: Bytes, stream: Any) -> None:
        """Enqueue a copy to the device."""
        with self._errors():
            self._driver.memcpy_htod_async(target, source, stream)

    def copy_out(self, target: Bytes, source: Any, stream: Any) -> None:
        """Enqueue a copy from the device."""
        with self._errors():
            self._driver.memcpy_dtoh_async(target, source, stream)

    def synchronize(self, stream: Any) -> None:
        """Wait for the stream."""
        with self._errors():
            stream.synchronize()

    def capture(self, stream: Any, work: Callable[[], None]) -> Any:
        """Raise `CudaError`: PyCUDA has no graphs."""
        raise CudaError("PyCUDA has no CUDA graphs; install cuda-python")

    def launch(self, graph: Any, stream: Any) -> None:
        """Raise `CudaError`: PyCUDA has no graphs."""
        raise CudaError("PyCUDA has no CUDA graphs; install cuda-python")

    def free_graph(self, graph: Any) -> None:
        """Do nothing: there are no graphs."""

    def close(self) -> None:
        """Release the primary context, on any thread."""
        if self._context is not None:
            # PyCUDA lets go of a context that is current; of another one only on the thread that opened it.
            with contextlib.suppress(self._driver.Error):
                self._context.push()
            self._context.detach()
            self._context = None

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except self._driver.Error as exc:
            raise CudaError(one_line(exc)) from exc
