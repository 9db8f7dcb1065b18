"""TensorRT 10 and 11 on an NVIDIA GPU.

Each call takes a context, a stream and page-locked buffers from a pool. A repeated call is one CUDA graph.
"""

from __future__ import annotations

import collections
import contextlib
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgefg.artifact.manifest import build_command, manifest_path, read_manifest
from edgefg.artifact.plan import OUT_OF_MEMORY, check_fits, check_header, gpu_number
from edgefg.errors import DeviceMismatchError, EdgefgError, InferenceError, RuntimeUnavailableError, one_line
from edgefg.log import get_logger
from edgefg.runtime import TensorSpec
from edgefg.runtimes.cuda import Cuda, CudaError, open_cuda
from edgefg.runtimes.tensorrt_context import Profile, RefusedError, Tensors, Worker

if TYPE_CHECKING:
    import tensorrt as trt

_log = get_logger(__name__)
# Each has the memory of a network of its own; that many in flight keep a GPU busy, more calls wait for their turn.
_MOST_WORKERS = 4


class TensorRTRuntime:
    """A TensorRT plan, shared by threads: each call takes a worker from a pool.

    Args:
        path: the plan; a manifest beside it says which device it was built for.
        threads: ignored on a GPU.
        device: ``GPU``, or ``GPU:1`` for the second one; None is the first.

    Raises:
        RuntimeUnavailableError: TensorRT, CUDA's bindings or a GPU are missing, or TensorRT refused the plan.
        DeviceMismatchError: the plan was built for another GPU or by another TensorRT.
    """

    companions = ()
    extra = "tensorrt"
    int8_remedy = ""

    def __init__(self, path: Path, *, threads: int | None = None, device: str | None = None) -> None:
        try:
            import tensorrt as trt
        except ImportError as exc:
            raise RuntimeUnavailableError(
                f"{path.name} needs TensorRT, which is not installed. On a Jetson it comes with JetPack; elsewhere: pip"
                " install 'edgefg[tensorrt]'. Run `edgefg doctor` for details"
            ) from exc
        self._path = path
        # Guards all that follows; notified at the end of every call.
        self._changed = threading.Condition()
        self._closed = False
        self._busy = 0
        self._idle: list[Worker] = []
        self._workers = 0
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
            raise ValueError(
                f"the batch is {batch.dtype} {list(batch.shape)}; expected uint8 {list(self._tensors.shape)}"
            )
        most = self._profiles[-1].most
        parts = [self._infer(batch[first : first + most]) for first in range(0, len(batch), most)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def close(self) -> None:
        """Free contexts, engine and memory; if calls are in flight, the last of them does it. Idempotent."""
        with self._changed:
            last = not self._closed and not self._busy
            self._closed = True
        if last:
            self._free()

    def __del__(self) -> None:
        """Free the GPU's memory, which Python does not count, if `close` was not called."""
        if hasattr(self, "_cuda"):
            self.close()

    def _load(self, trt: Any, data: bytes) -> None:
        # Without local names, which the traceback of a failure would keep alive.
        try:
            self._runtime = trt.Runtime(self._logger)
        except TypeError as exc:  # pybind's word for a null pointer: no memory, no device
            raise RuntimeUnavailableError(f"TensorRT {trt.__version__} does not start: {self._said()}") from exc
        self._engine = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            raise _refusal(self._path, f"TensorRT {trt.__version__} refused {self._path}: {self._said()}")
        self._tensors = _tensors(trt, self._engine, self._path)
        self._profiles = _profiles(self._engine, self._tensors)

    def _infer(self, batch: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Run one batch that a profile takes, filled up to the profile's least."""
        count = len(batch)
        profile = next(profile for profile in self._profiles if profile.most >= count)
        if count < profile.least:
            batch = np.concatenate([batch, np.repeat(batch[-1:], profile.least - count, axis=0)])
        with self._changed:
            if self._closed:
                raise RuntimeError("this runtime is closed")
            self._busy += 1
        worker = None
        try:
            with self._cuda.current():
                worker = self._take(profile, len(batch))
                logits = worker.run(batch)
                done, worker = worker, None
                with self._changed:
                    self._idle.append(done)
            return logits[:count]
        except RefusedError as exc:
            raise InferenceError(f"{self._path.name}: TensorRT {exc}: {self._said()}") from exc
        except CudaError as exc:
            raise InferenceError(f"{self._path.name}: {one_line(exc)}; if this persists, restart the process") from exc
        finally:
            self._leave(worker)

    def _take(self, profile: Profile, count: int) -> Worker:
        """Take a worker: preferably one that ran this batch last, else one of the profile, else a new one."""
        # One at a time: engines are not promised to make contexts for several threads at once.
        with self._changed:
            while True:
                fitting = [worker for worker in self._idle if worker.profile == profile]
                if fitting:
                    worker = max(fitting, key=lambda worker: worker.count == count)
                    self._idle.remove(worker)
                    return worker
                if self._workers == _MOST_WORKERS and self._idle:
                    self._drop(self._idle.pop(0))
                if self._workers < _MOST_WORKERS:
                    break
                self._changed.wait()
            assert self._engine is not None
            worker = Worker(self._cuda, self._engine, self._tensors, profile)
            self._workers += 1
            return worker

    def _drop(self, worker: Worker) -> None:
        worker.free_context()
        worker.free_memory()
        self._workers -= 1

    def _leave(self, broken: Worker | None) -> None:
        """End a call; a worker that failed in it is not used again."""
        with self._changed:
            if broken is not None:
                with self._anyhow():
                    self._drop(broken)
            self._busy -= 1
            self._changed.notify_all()  # all, since one may fail and leave the others asleep
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
        """Make the device current, or go on without it if it has failed: references must be dropped in any case."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(CudaError):
                stack.enter_context(self._cuda.current())
            yield

    def _said(self) -> str:
        """Return TensorRT's last errors and forget them."""
        said = []
        with contextlib.suppress(IndexError):  # a failing call on another thread takes its part
            while True:
                said.append(self._messages.popleft())
        return "; ".join(said) or "it gave no reason"


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


def _refusal(path: Path, said: str) -> EdgefgError:
    """Return an error that says how to repair a plan that TensorRT refuses."""
    info = read_manifest(path).plan if manifest_path(path).exists() else None
    if OUT_OF_MEMORY.search(said):
        return RuntimeUnavailableError(f"{said}; stop what else uses the GPU")
    if info is None or info.source is None:
        return RuntimeUnavailableError(f"{said}; copy or build it again")
    return DeviceMismatchError(f"{said}; build it here: {build_command(path, info)}")


def _tensors(trt: Any, engine: trt.ICudaEngine, path: Path) -> Tensors:
    """Describe the engine's input and output. Raises `RuntimeUnavailableError` if it is not a classifier."""
    names: list[str] = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    outputs = [name for name in names if name not in inputs]
    shapes = [tuple(engine.get_tensor_shape(name)) for name in (*inputs, *outputs)]
    try:
        dtypes = [np.dtype(trt.nptype(engine.get_tensor_dtype(name))) for name in (*inputs, *outputs)]
    except TypeError as exc:  # BF16 and FP8 have no NumPy type
        raise RuntimeUnavailableError(
            f"{path} has a tensor of a type that NumPy does not have; build a classifier with uint8 input"
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
            f"{path} has {found}; expected one input uint8 [N, H, W, 3] and one output, logits [N, classes]"
        )
    shape = tuple(None if size < 0 else size for size in shapes[0])
    return Tensors(inputs[0], shape, math.prod(shapes[0][1:]), outputs[0], shapes[1][1], dtypes[1])


def _profiles(engine: trt.ICudaEngine, tensors: Tensors) -> list[Profile]:
    """List the profiles, that of the smallest batches first."""
    fixed = tensors.shape[0]
    if fixed is not None:
        return [Profile(0, fixed, fixed)]
    found = []
    for index in range(engine.num_optimization_profiles):
        least, _, most = engine.get_tensor_profile_shape(tensors.input, index)
        found.append(Profile(index, least[0], most[0]))
    return sorted(found, key=lambda profile: profile.most)


def _logger(trt: Any, messages: collections.deque[str]) -> trt.ILogger:
    """Make a logger that keeps the last errors for our messages, and passes everything to Python's logging."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                messages.append(" ".join(msg.split()))
            _log.debug("%s", msg)

    return Logger()
