"""TensorRT 10 and 11: an engine in a plan file, run on an NVIDIA GPU.

Each call has a context, a stream and page-locked buffers of its own, from a pool; repeated, it is one CUDA graph.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edgefg.errors import InferenceError, RuntimeUnavailableError, one_line
from edgefg.manifest import manifest_path, read_manifest
from edgefg.plan import check_fits, check_header, gpu_number
from edgefg.runtime import TensorSpec
from edgefg.runtimes.cuda import Bytes, Cuda, CudaError, open_cuda

if TYPE_CHECKING:
    import tensorrt as trt

_log = logging.getLogger("edgefg.tensorrt")


class TensorRTRuntime:
    """A TensorRT plan; threads share it, each call checks a worker out of a pool.

    Args:
        path: the plan; a manifest beside it says which device it was built for.
        threads: without meaning on a GPU.
        device: ``GPU``, or ``GPU:1`` for the second one; None is the first.

    Raises:
        RuntimeUnavailableError: TensorRT, CUDA's bindings or a GPU are missing, or TensorRT refused the plan.
        DeviceMismatchError: the plan was built for another GPU or by another TensorRT.
    """

    def __init__(self, path: Path, *, threads: int | None = None, device: str | None = None) -> None:
        try:
            import tensorrt as trt
        except ImportError as exc:
            raise RuntimeUnavailableError(
                f"{path.name} needs TensorRT, which is not installed: it comes with JetPack on a Jetson, elsewhere pip"
                " install 'edgefg[tensorrt]'; `edgefg doctor` says more"
            ) from exc
        self._path = path
        self._lock = threading.Lock()
        self._closed = False
        self._busy = 0
        self._idle: list[_Worker] = []
        self._runtime: trt.Runtime | None = None
        self._engine: trt.ICudaEngine | None = None
        self.version = f"tensorrt {trt.__version__}"
        self._messages: collections.deque[str] = collections.deque(maxlen=4)
        # Engines write to it as long as they live.
        self._logger: trt.ILogger = _logger(trt, self._messages)
        self._cuda = open_cuda(gpu_number(device, path))
        try:
            with self._cuda.current():
                self._load(trt, _read(path, self._cuda, trt.__version__))
        except BaseException:
            self.close()
            raise
        self.input = TensorSpec(self._tensors.shape, "uint8")

    def infer(self, batch: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return the logits, ``float32 [N, classes]``, of ``uint8 [N, H, W, 3]``.

        Raises:
            InferenceError: TensorRT or CUDA failed.
        """
        if batch.dtype != np.uint8 or batch.shape[1:] != self._tensors.shape[1:]:
            raise ValueError(f"a batch is {batch.dtype} {list(batch.shape)}; needed uint8 {list(self._tensors.shape)}")
        most = self._profiles[-1].most
        parts = [self._infer(batch[first : first + most]) for first in range(0, len(batch), most)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def close(self) -> None:
        """Free contexts, engine and memory; where calls are in flight, the last of them does. Idempotent."""
        with self._lock:
            last = not self._closed and not self._busy
            self._closed = True
        if last:
            self._free()

    def _load(self, trt: Any, data: bytes) -> None:
        # Without local names, which the traceback of a failure would keep alive.
        try:
            self._runtime = trt.Runtime(self._logger)
        except TypeError as exc:  # pybind's word for a null pointer: no memory, no device
            raise RuntimeUnavailableError(f"TensorRT {trt.__version__} does not start: {self._said()}") from exc
        self._engine = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            raise RuntimeUnavailableError(
                f"TensorRT {trt.__version__} refused {self._path}: {self._said()}; copy or build it again"
            )
        self._tensors = _tensors(trt, self._engine, self._path)
        self._profiles = _profiles(self._engine, self._tensors)

    def _infer(self, batch: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Run one batch that a profile takes, filled up to the profile's least."""
        count = len(batch)
        profile = next(profile for profile in self._profiles if profile.most >= count)
        if count < profile.least:
            batch = np.concatenate([batch, np.repeat(batch[-1:], profile.least - count, axis=0)])
        with self._lock:
            if self._closed:
                raise RuntimeError("this runtime is closed")
            self._busy += 1
        worker = None
        try:
            with self._cuda.current():
                worker = self._take(profile)
                logits = worker.run(batch)
                done, worker = worker, None
                with self._lock:
                    self._idle.append(done)
            return logits[:count]
        except _RefusedError as exc:
            raise InferenceError(f"{self._path.name}: TensorRT {exc}: {self._said()}") from exc
        except CudaError as exc:
            raise InferenceError(
                f"{self._path.name}: {one_line(exc)}; where this stays so, start the process again"
            ) from exc
        finally:
            self._leave(worker)

    def _take(self, profile: _Profile) -> _Worker:
        # One at a time: engines are not promised to make contexts for several threads at once.
        with self._lock:
            for at, worker in enumerate(self._idle):
                if worker.profile == profile:
                    return self._idle.pop(at)
            assert self._engine is not None
            return _Worker(self._cuda, self._engine, self._tensors, profile)

    def _leave(self, broken: _Worker | None) -> None:
        """End a call; a worker that failed in it is not used again."""
        if broken is not None:
            with self._anyhow():
                broken.free_context()
                broken.free_memory()
        with self._lock:
            self._busy -= 1
            last = self._closed and not self._busy
        if last:
            self._free()

    def _free(self) -> None:
        """Graphs and contexts, then engine, runtime, memory and streams; the logger outlives them."""
        with self._anyhow():
            workers, self._idle = self._idle, []
            for worker in workers:
                worker.free_context()
            self._engine = None
            self._runtime = None
            for worker in workers:
                worker.free_memory()
        self._cuda.close()

    @contextlib.contextmanager
    def _anyhow(self) -> Iterator[None]:
        """Make the device current or, where it has failed for good, go on without: references must go all the same."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(CudaError):
                stack.enter_context(self._cuda.current())
            yield

    def _said(self) -> str:
        return "; ".join(self._messages) or "it gave no reason"


class _RefusedError(Exception):
    """TensorRT returned False or None where it should not have."""


class _Tensors(NamedTuple):
    """The one input and the one output of an engine."""

    input: str
    shape: tuple[int | None, ...]
    """``[N, H, W, 3]``; N is None where the engine takes several."""
    pixels: int
    """H × W × 3."""
    output: str
    classes: int
    dtype: np.dtype[Any]
    """Of the logits."""


class _Profile(NamedTuple):
    """An optimisation profile: the batches that it takes."""

    number: int
    least: int
    most: int


class _Worker:
    """An execution context with its stream and buffers; runs one batch at a time."""

    def __init__(self, cuda: Cuda, engine: trt.ICudaEngine, tensors: _Tensors, profile: _Profile) -> None:
        self.profile = profile
        self._cuda = cuda
        self._tensors = tensors
        self._context: trt.IExecutionContext | None = None
        self._stream: Any = None
        self._pinned: list[Bytes] = []
        self._memory: list[Any] = []
        self._graph: Any = None
        self._with_graphs = cuda.graphs
        self._count = 0
        try:
            self._open(engine)
        except BaseException:
            self.free_context()
            self.free_memory()
            raise

    def _open(self, engine: trt.ICudaEngine) -> None:
        cuda, tensors, most = self._cuda, self._tensors, self.profile.most
        self._stream = cuda.stream()
        context: trt.IExecutionContext | None = engine.create_execution_context()
        if context is None:
            raise _RefusedError("could not create an execution context")
        self._context = context
        handle = cuda.handle(self._stream)
        _check(context.set_optimization_profile_async(self.profile.number, handle), "refused the batch's profile")
        cuda.synchronize(self._stream)
        sizes = (most * tensors.pixels, most * tensors.classes * tensors.dtype.itemsize)
        for name, size in zip((tensors.input, tensors.output), sizes, strict=True):
            self._pinned.append(cuda.pinned(size))
            self._memory.append(cuda.allocate(size))
            _check(context.set_tensor_address(name, int(self._memory[-1])), f"refused the address of {name}")

    def run(self, batch: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return the logits, ``float32 [N, classes]``, of one batch, as an array of the caller's own."""
        count, tensors = len(batch), self._tensors
        repeated = count == self._count
        if not repeated:
            self._reshape(batch.shape)
        source = self._pinned[0][: batch.size]
        target = self._pinned[1][: count * tensors.classes * tensors.dtype.itemsize]
        np.copyto(source.reshape(batch.shape), batch)
        # TensorRT may still set itself up in the first run of a shape, which a graph must not record.
        if repeated and self._graph is None and self._with_graphs:
            self._capture(lambda: self._enqueue(source, target))
        if self._graph is not None:
            self._cuda.launch(self._graph, self._stream)
        else:
            self._enqueue(source, target)
        self._cuda.synchronize(self._stream)
        return target.view(tensors.dtype).reshape(count, tensors.classes).astype(np.float32)

    def _enqueue(self, source: Bytes, target: Bytes) -> None:
        context = self._context
        assert context is not None
        self._cuda.copy_in(self._memory[0], source, self._stream)
        _check(context.execute_async_v3(self._cuda.handle(self._stream)), "failed to run the network")
        self._cuda.copy_out(target, self._memory[1], self._stream)

    def _reshape(self, shape: tuple[int, ...]) -> None:
        """Set another batch size. A graph belongs to the shape that it was captured with."""
        self._free_graph()
        self._count = 0
        context = self._context
        assert context is not None
        _check(context.set_input_shape(self._tensors.input, shape), f"refused the shape {list(shape)}")
        if missing := context.infer_shapes():
            raise _RefusedError(f"still needs {', '.join(missing)}")
        found = tuple(context.get_tensor_shape(self._tensors.output))
        if found != (shape[0], self._tensors.classes):
            raise _RefusedError(f"gives logits {list(found)}; needed {[shape[0], self._tensors.classes]}")
        self._count = shape[0]

    def _capture(self, work: Callable[[], None]) -> None:
        try:
            self._graph = self._cuda.capture(self._stream, work)
        except (CudaError, _RefusedError) as exc:
            self._with_graphs = False
            _log.warning("no CUDA graph (%s); the network runs without one, somewhat slower", one_line(exc))

    def _free_graph(self) -> None:
        if self._graph is not None:
            graph, self._graph = self._graph, None
            self._cuda.free_graph(graph)

    def free_context(self) -> None:
        """Wait for what a failed call left under way, then destroy the graph and the context."""
        if self._stream is not None:
            _try(functools.partial(self._cuda.synchronize, self._stream))
        _try(self._free_graph)
        self._context = None

    def free_memory(self) -> None:
        """Free the buffers, then the stream. After a failure of the GPU these fail too, which changes nothing."""
        for memory in self._memory:
            _try(functools.partial(self._cuda.free, memory))
        for pinned in self._pinned:
            _try(functools.partial(self._cuda.free_pinned, pinned))
        self._memory, self._pinned = [], []
        if self._stream is not None:
            stream, self._stream = self._stream, None
            _try(functools.partial(self._cuda.free_stream, stream))


def _check(done: bool, what: str) -> None:
    if not done:
        raise _RefusedError(what)


def _try(free: Callable[[], None]) -> None:
    try:
        free()
    except CudaError as exc:
        _log.debug("%s", exc)


def _read(path: Path, cuda: Cuda, version: str) -> bytes:
    """Read a plan that belongs to this device; nothing of it has been deserialised yet."""
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise RuntimeUnavailableError(f"cannot read {path}: {exc.strerror}") from exc
    written_by = check_header(data, path)
    info = read_manifest(path).plan if manifest_path(path).exists() else None
    check_fits(path, info, written_by, cuda.device(), version)
    return data


def _tensors(trt: Any, engine: trt.ICudaEngine, path: Path) -> _Tensors:
    """Describe the engine's input and output. Raises `RuntimeUnavailableError` where it is no classifier's."""
    names: list[str] = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    outputs = [name for name in names if name not in inputs]
    shapes = [tuple(engine.get_tensor_shape(name)) for name in (*inputs, *outputs)]
    try:
        dtypes = [np.dtype(trt.nptype(engine.get_tensor_dtype(name))) for name in (*inputs, *outputs)]
    except TypeError as exc:  # BF16 and FP8 have no NumPy type
        raise RuntimeUnavailableError(
            f"{path} has a tensor of a type that NumPy does not have; needed uint8 in"
        ) from exc
    if (
        [len(inputs), len(outputs)] != [1, 1]
        or [len(shape) for shape in shapes] != [4, 2]
        or shapes[1][1] < 1
        or dtypes[0] != np.uint8
        or dtypes[1] not in (np.float32, np.float16)
    ):
        found = ", ".join(f"{name} {dtype} {list(s)}" for name, dtype, s in zip(names, dtypes, shapes, strict=True))
        raise RuntimeUnavailableError(
            f"{path} has {found}; needed one input uint8 [N, H, W, 3] and one output, logits [N, classes]"
        )
    shape = tuple(None if size < 0 else size for size in shapes[0])
    return _Tensors(inputs[0], shape, math.prod(shapes[0][1:]), outputs[0], shapes[1][1], dtypes[1])


def _profiles(engine: trt.ICudaEngine, tensors: _Tensors) -> list[_Profile]:
    """List the profiles, that of the smallest batches first."""
    fixed = tensors.shape[0]
    if fixed is not None:
        return [_Profile(0, fixed, fixed)]
    found = []
    for index in range(engine.num_optimization_profiles):
        least, _, most = engine.get_tensor_profile_shape(tensors.input, index)
        found.append(_Profile(index, least[0], most[0]))
    return sorted(found, key=lambda profile: profile.most)


def _logger(trt: Any, messages: collections.deque[str]) -> trt.ILogger:
    """Make a logger that keeps the last errors, for our own messages, and hands the rest to Python's logging."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                messages.append(" ".join(msg.split()))
            _log.debug("%s", msg)

    return Logger()
