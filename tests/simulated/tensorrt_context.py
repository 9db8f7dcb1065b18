"""Simulated TensorRT: IExecutionContext, which runs an engine, for one caller at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.simulated.memory import Allocation
from tests.simulated.streams import Item, Running, Stream
from tests.simulated.tensorrt_core import Dims

if TYPE_CHECKING:
    from tests.simulated.plan_format import Shape
    from tests.simulated.tensorrt_engine import ICudaEngine, Site

ALIGNMENT = 256
DEFAULT_STREAM = (
    "Using default stream in enqueueV3() may lead to performance issues due to additional calls to"
    " cudaStreamSynchronize() by TensorRT to ensure correct synchronization. Please use non-default stream instead."
)


class IExecutionContext:
    """The state of one execution: shapes and addresses. Not to be used by two threads at once."""

    __slots__ = (
        "__weakref__",
        "_addresses",
        "_bound",
        "_engine",
        "_life",
        "_profile",
        "_running",
        "_shapes",
        "_site",
        "_switched",
        "_voice",
        "_warm",
        "debug_sync",
        "enqueue_emits_profile",
        "error_recorder",
        "name",
        "nvtx_verbosity",
    )
    _addresses: dict[str, int]
    _bound: tuple[dict[str, np.ndarray], tuple[Allocation, ...]] | None
    _engine: Any
    _life: Any
    _profile: Any
    _running: Any
    _shapes: dict[str, Shape]
    _site: Any
    _switched: tuple[Stream, int] | None
    _voice: Any
    _warm: Any
    debug_sync: Any
    enqueue_emits_profile: Any
    error_recorder: Any
    name: Any
    nvtx_verbosity: Any

    def __init__(self) -> None:
        raise TypeError("tensorrt.IExecutionContext: No constructor defined!")

    @classmethod
    def _make(cls, engine: ICudaEngine, held: Any, size: int) -> IExecutionContext:
        self = object.__new__(cls)
        site = engine.site
        self._engine, self._site, self._voice = held, site, engine._voice
        self._addresses = {}
        self._shapes = {}
        self._profile, self._warm, self._running = 0, False, Running()
        self._bound = None
        self._switched = None
        self.name, self.error_recorder, self.nvtx_verbosity = "", None, None
        self.debug_sync = self.enqueue_emits_profile = False
        running = self._running
        parents = (engine._life, engine._voice.life)
        self._life = site.books.born(self, "contexts", parents, lambda: _ended(site, running, size))
        return self

    @property
    def engine(self) -> ICudaEngine:
        found: ICudaEngine | None = self._engine()
        if found is None:
            self._site.books.violation("an execution context was used after its engine was released")
            raise ReferenceError("the engine of this context was released (simulated)")
        return found

    active_optimization_profile = property(lambda self: self._profile)
    all_binding_shapes_specified = property(lambda self: not self.infer_shapes())

    def _wrong(self, call: str, text: str) -> bool:
        """Note a wrong use and log it as TensorRT does; always False."""
        self._site.books.violation(f"{call}: {text}")
        return self._refuse(call, text)

    def _refuse(self, call: str, text: str) -> bool:
        self._voice.error(f"Error Code 3: API Usage Error ({call}: {text})")
        return False

    def _is_busy(self, call: str) -> bool:
        if self._running.busy:
            self._wrong(call, "the context is at work: its stream was not synchronized since it was enqueued")
        return self._running.busy

    def set_optimization_profile_async(self, profile_index: int, stream_handle: Any) -> bool:
        call = "set_optimization_profile_async"
        stream = self._site.device.stream_of(int(stream_handle), call)
        if stream is None or self._is_busy(call):
            return False
        if not 0 <= profile_index < self.engine.num_optimization_profiles:
            return self._wrong(call, f"there is no profile {profile_index}")
        self._profile = int(profile_index)
        self._shapes.clear()  # the dynamic sizes set before belong to the other profile
        self._changed()
        stream.add(Item(lambda: None))
        self._switched = (stream, stream.waits)
        return True

    def _changed(self) -> None:
        self._bound, self._warm = None, False

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        call, engine = "set_input_shape", self.engine
        if self._is_busy(call):
            return False
        if name not in engine._inputs:
            return self._wrong(call, f"{name!r} is no input")
        wanted = tuple(int(size) for size in shape)
        least, _, most = engine._range(name, self._profile)
        if len(wanted) != len(least) or not all(a <= b <= c for a, b, c in zip(least, wanted, most, strict=True)):
            return self._refuse(
                call, f"shape {list(wanted)} of {name!r} is not within profile {self._profile}, {least} to {most}"
            )
        if self._shapes.get(name) != wanted:
            self._shapes[name] = wanted
            self._changed()
        return True

    def infer_shapes(self) -> list[str]:
        engine = self.engine
        return [name for name in engine._inputs if -1 in engine._shape(name) and name not in self._shapes]

    def get_tensor_shape(self, name: str) -> Dims:
        if not self.engine._known(name, "get_tensor_shape"):
            return Dims()
        return Dims(self._shape(name))

    def _shape(self, name: str) -> Shape:
        """Return a tensor's shape for the inputs' shapes; -1 where those do not tell it."""
        engine = self.engine
        if name in self._shapes:
            return self._shapes[name]
        fixed = engine._shape(name)
        if -1 not in fixed or name in engine._inputs or self.infer_shapes():
            return fixed
        known = {  # the exporter gives one size one name, wherever it occurs
            symbol: size
            for given, shape in self._shapes.items()
            for symbol, size in zip(engine._tensors[given].shape, shape, strict=True)
        }
        batch = next(iter(self._shapes.values()))[0]
        symbols = engine._tensors[name].shape
        found = [size if isinstance(size, int) else known.get(size, -1) for size in symbols]
        if found[0] == -1:
            found[0] = batch
        return tuple(found)

    def set_tensor_address(self, name: str, memory: Any) -> bool:
        call, address = "set_tensor_address", int(memory)
        if not self.engine._known(name, call):
            return False
        self._bound = None
        if not address:
            self._addresses.pop(name, None)
            return True
        found = self._site.device.memory.find(address, 1)
        if found is None or found.pinned:
            what = self._site.device.memory.describe(address, 1) if found is None else "memory of the host"
            return self._wrong(call, f"{name!r} is to lie in {what}")
        if address % ALIGNMENT:
            return self._wrong(call, f"the address of {name!r} is not aligned to {ALIGNMENT} bytes")
        self._addresses[name] = address
        return True

    def get_tensor_address(self, name: str) -> int:
        return self._addresses.get(name, 0) if self.engine._known(name, "get_tensor_address") else 0

    def execute_async_v3(self, stream_handle: Any) -> bool:
        call, site, handle = "execute_async_v3", self._site, int(stream_handle)
        fault = site.books.fault(call)
        if fault is not None and not fault.late:
            self._voice.error(f"Error Code 1: Cuda Runtime ({_text(fault.error)})")
            return False
        stream = site.device.stream_of(handle, call)
        if stream is None or site.device.check_device(stream, call) or not self._ready(stream):
            if stream is not None and stream.capture is not None:
                stream.capture.invalid = True
            return False
        if not handle:
            site.books.warnings.append(DEFAULT_STREAM)
            self._voice.warn(DEFAULT_STREAM)
        if fault is not None:
            site.device.enqueue_failure(stream, fault.error, fault.sticky)
            return True
        assert self._bound is not None
        arrays, memory = self._bound
        stream.add(Item(_run(self.engine, arrays), memory, (self._running,)))
        self._warm = True
        return True

    def _ready(self, stream: Stream) -> bool:
        """Check all that an execution needs, and bind its memory where something changed."""
        call, engine = "execute_async_v3", self.engine
        if engine.device != stream.device:
            return self._wrong(call, "the stream belongs to another device than the engine")
        if self._is_busy(call):
            return False
        if unset := [name for name in engine._tensors if name not in self._addresses]:
            return self._wrong(call, f"no address is set for {', '.join(unset)}")
        if self._switched is not None:
            where, waits = self._switched
            if where is not stream and where.waits == waits:
                return self._wrong(call, "the stream of set_optimization_profile_async was not synchronized")
            self._switched = None
        if stream.capture is not None and not self._warm:
            return self._wrong(call, "captured before a plain run since shapes or profile were set")
        if self._bound is None or any(allocation.freed for allocation in self._bound[1]):
            return self._bind(call)
        return True

    def _bind(self, call: str) -> bool:
        if missing := self.infer_shapes():
            return self._wrong(call, f"no shape is set for {', '.join(missing)}")
        arrays, memory, find = {}, [], self._site.device.memory
        for name, address in self._addresses.items():
            shape, dtype = self._shape(name), self.engine._numpy(name)
            if -1 in shape:
                return self._wrong(call, f"the simulation cannot tell the shape of {name!r}: {shape}")
            size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            allocation = find.find(address, size)
            if allocation is None:
                return self._wrong(call, f"{name!r} {list(shape)} lies in {find.describe(address, size)}")
            if allocation.device != self.engine.device:
                return self._wrong(call, f"{name!r} lies on device {allocation.device}, the engine on another")
            arrays[name] = allocation.view(address, size).view(dtype).reshape(shape)
            memory.append(allocation)
        self._bound = arrays, tuple(memory)
        return True


def _run(engine: ICudaEngine, arrays: dict[str, np.ndarray]) -> Any:
    """Return the work of one execution; it needs the engine's session, not the engine, which may go meanwhile."""
    session, plan = engine.session, engine.plan
    feed = {name: arrays[name] for name in engine._inputs}
    outputs = [arrays[name] for name in engine._outputs]

    def run() -> None:
        if plan.slow:
            time.sleep(plan.slow)
        for output, values in zip(outputs, session.run(None, feed), strict=True):
            output[...] = values
            if plan.wrong and output.dtype.kind == "f":
                output += np.asarray(plan.wrong, output.dtype)

    return run


def _text(code: int) -> str:
    from tests.simulated.codes import ERRORS

    return ERRORS.get(code, ("", "unknown error"))[1]


def _ended(site: Site, running: Running, size: int) -> None:
    site.release("an execution context", size)
    if running.busy:
        site.books.violation("a context was destroyed while it ran")
    if any(running in graph.contexts for graph in list(site.device.graphs.values())):
        site.books.violation("a context was destroyed while a captured graph still uses it")
