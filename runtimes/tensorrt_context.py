"""One execution context of a TensorRT engine, with the stream and the buffers that its runs need."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edgefg.errors import one_line
from edgefg.log import get_logger
from edgefg.runtimes.cuda import Bytes, Cuda, CudaError

if TYPE_CHECKING:
    import tensorrt as trt

_log = get_logger(__name__)


class RefusedError(Exception):
    """TensorRT returned False or None."""


class Tensors(NamedTuple):
    """The one input and the one output of an engine."""

    input: str
    shape: tuple[int | None, ...]
    """``[N, H, W, 3]``; N is None if the engine takes several."""
    pixels: int
    """H × W × 3."""
    output: str
    classes: int
    dtype: np.dtype[Any]
    """Of the logits."""


class Profile(NamedTuple):
    """An optimisation profile and its batches."""

    number: int
    least: int
    most: int


class Worker:
    """An execution context with its stream and buffers; runs one batch at a time."""

    def __init__(self, cuda: Cuda, engine: trt.ICudaEngine, tensors: Tensors, profile: Profile) -> None:
        self.profile = profile
        self.count = 0
        """The batch that its context is set to."""
        self._cuda = cuda
        self._tensors = tensors
        self._context: trt.IExecutionContext | None = None
        self._stream: Any = None
        self._pinned: list[Bytes] = []
        self._memory: list[Any] = []
        self._graph: Any = None
        self._with_graphs = cuda.graphs
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
            raise RefusedError("could not create an execution context")
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
        repeated = count == self.count
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
        self.count = 0
        context = self._context
        assert context is not None
        _check(context.set_input_shape(self._tensors.input, shape), f"refused the shape {list(shape)}")
        if missing := context.infer_shapes():
            raise RefusedError(f"still needs {', '.join(missing)}")
        found = tuple(context.get_tensor_shape(self._tensors.output))
        if found != (shape[0], self._tensors.classes):
            raise RefusedError(f"returns logits {list(found)}; expected {[shape[0], self._tensors.classes]}")
        self.count = shape[0]

    def _capture(self, work: Callable[[], None]) -> None:
        try:
            self._graph = self._cuda.capture(self._stream, work)
        except (CudaError, RefusedError) as exc:
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
        """Free the buffers, then the stream. After a failure of the GPU these fail too, which does not matter."""
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
        raise RefusedError(what)


def _try(free: Callable[[], None]) -> None:
    try:
        free()
    except CudaError as exc:
        _log.debug("%s", exc)
