"""Simulated TensorRT, the side that runs plans: Runtime, ICudaEngine, IExecutionContext. It computes with ONNX Runtime.

A simulated plan begins as a real one does; after the header it holds a description as JSON and the ONNX file.
"""

from __future__ import annotations

import enum
import hashlib
import struct
import time
import weakref
from typing import Any

import msgspec
import numpy as np

from tests.simulated.books import Books
from tests.simulated.cuda_runtime import SimulatedCuda, Stream

VERSIONS = {10: (10, 16, 1, 11), 11: (11, 4, 0, 106)}
_MAGIC = 0x74727466


class Plan(msgspec.Struct, kw_only=True):
    """What a simulated plan says of itself."""

    gpu: str
    compute_capability: tuple[int, int]
    compatible: str = "NONE"
    profiles: list[tuple[int, int, int]] = []
    slow: float = 0.0
    wrong: float = 0.0


class DataType(enum.Enum):
    FLOAT = "float32"
    HALF = "float16"
    UINT8 = "uint8"
    INT8 = "int8"


class TensorIOMode(enum.IntEnum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class Severity(enum.IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class ILogger:
    """Base of the loggers that callers write."""

    Severity = Severity
    INTERNAL_ERROR, ERROR, WARNING = Severity.INTERNAL_ERROR, Severity.ERROR, Severity.WARNING

    def __init__(self) -> None:
        self.initialised = True

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


def tell(logger: ILogger, severity: Severity, text: str) -> None:
    """Log as TensorRT does: only through a logger whose base was initialised."""
    assert getattr(logger, "initialised", False), "ILogger.__init__ was not called"
    logger.log(severity, f"[simulated] {text}")


def write_plan(plan: Plan, onnx: bytes, version: tuple[int, int, int, int]) -> bytes:
    text = msgspec.json.encode(plan)
    body = struct.pack("<I", len(text)) + text + onnx
    return struct.pack("<II16x", _MAGIC, 0) + bytes(version) + body + hashlib.sha256(body).digest()


def read_plan(data: bytes, version: tuple[int, int, int, int]) -> tuple[Plan, bytes]:
    """Raise ValueError, with what TensorRT would log, where it would refuse the bytes."""
    if len(data) < 64 or struct.unpack_from("<II", data) != (_MAGIC, 0):
        raise ValueError("Error Code 1: Serialization (magicTag mismatch)")
    if tuple(data[24:28]) != version:
        raise ValueError(f"Error Code 6: API Usage Error (plan of {tuple(data[24:28])}, library {version})")
    body, digest = data[28:-32], data[-32:]
    if hashlib.sha256(body).digest() != digest:
        raise ValueError("Error Code 1: Serialization (engine data is corrupt)")
    (size,) = struct.unpack_from("<I", body)
    return msgspec.json.decode(body[4 : 4 + size], type=Plan), body[4 + size :]


class Engines:
    """Makes the classes of this side over one set of books."""

    def __init__(self, books: Books, cuda: SimulatedCuda, version: tuple[int, int, int, int]) -> None:
        self.books, self.cuda, self.version = books, cuda, version


class Runtime:
    site: Engines

    def __init__(self, logger: ILogger) -> None:
        self.logger = logger
        self.engine_host_code_allowed = False
        self.site.books.born(self, "runtimes")

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
        books = self.site.books
        if self.engine_host_code_allowed:
            books.violation("engine_host_code_allowed was set: a plan may then run code on the host")
        try:
            plan, onnx = read_plan(bytes(serialized_engine), self.site.version)
        except ValueError as exc:
            tell(self.logger, Severity.ERROR, str(exc))
            return None
        fits = plan.compute_capability == books.config.compute_capability
        if plan.compatible == "AMPERE_PLUS":
            fits = books.config.compute_capability >= (8, 0)
        if not fits:
            tell(self.logger, Severity.ERROR, "Error Code 6: the engine plan was generated on an incompatible device")
            return None
        if books.fails("deserialize_cuda_engine"):
            tell(self.logger, Severity.ERROR, "Error Code 2: OutOfMemory (requested size was too large)")
            return None
        return ICudaEngine(self, plan, onnx)


class ICudaEngine:
    def __init__(self, runtime: Runtime, plan: Plan, onnx: bytes) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self.runtime, self.plan = runtime, plan
        self.session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
        self._tensors = {tensor.name: tensor for tensor in (*self.session.get_inputs(), *self.session.get_outputs())}
        self._inputs = [tensor.name for tensor in self.session.get_inputs()]
        runtime.site.books.born(self, "engines")

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    @property
    def num_optimization_profiles(self) -> int:
        return max(1, len(self.plan.profiles))

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else -1 for size in self._tensors[name].shape)

    def get_tensor_dtype(self, name: str) -> DataType:
        kinds = {"tensor(uint8)": DataType.UINT8, "tensor(float)": DataType.FLOAT, "tensor(float16)": DataType.HALF}
        return kinds[self._tensors[name].type]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        rest = self.get_tensor_shape(name)[1:]
        return [(size, *rest) for size in self.plan.profiles[profile_index]]

    def create_execution_context(self) -> IExecutionContext | None:
        if self.runtime.site.books.fails("create_execution_context"):
            tell(self.runtime.logger, Severity.ERROR, "Error Code 2: OutOfMemory (no memory for the context)")
            return None
        return IExecutionContext(self)


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self.engine = engine
        self._books, self._cuda = engine.runtime.site.books, engine.runtime.site.cuda
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._profile = 0
        self._busy: list[bool] = [False]
        self._books.born(self, "contexts")
        weakref.finalize(self, _ended, self._books, self._busy)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._profile = profile_index
        known = self._cuda.stream_of(stream_handle, "set_optimization_profile_async") is not None
        return known and 0 <= profile_index < self.engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if self._busy[0]:
            self._books.violation("set_input_shape while the context runs")
        fixed = self.engine.get_tensor_shape(name)
        fits = len(shape) == len(fixed) and all(f in (-1, s) for f, s in zip(fixed, shape, strict=True))
        if fits and fixed[0] == -1:
            least, _, most = self.engine.plan.profiles[self._profile]
            fits = least <= shape[0] <= most
        if not fits:
            tell(
                self.engine.runtime.logger, Severity.ERROR, f"Error Code 3: shape {shape} does not satisfy the profile"
            )
            return False
        self._shapes[name] = tuple(shape)
        return True

    def infer_shapes(self) -> list[str]:
        inputs = [name for name in self._names() if self.engine.get_tensor_mode(name) == TensorIOMode.INPUT]
        return [name for name in inputs if -1 in self.engine.get_tensor_shape(name) and name not in self._shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        shape = self.engine.get_tensor_shape(name)
        batch = next(iter(self._shapes.values()))[0] if self._shapes else -1
        return self._shapes.get(name) or tuple(batch if size == -1 else size for size in shape)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if self._books.find(self._books.device, memory, 1) is None:
            self._books.violation(f"set_tensor_address({name!r}) with what is no device memory")
            return False
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        if self._books.fails("execute_async_v3"):
            tell(self.engine.runtime.logger, Severity.ERROR, "Error Code 1: Cuda Runtime (an illegal memory access)")
            return False
        stream = self._cuda.stream_of(stream_handle, "execute_async_v3")
        if stream is None or set(self._addresses) != set(self._names()) or self.infer_shapes():
            self._books.violation("execute_async_v3 without a stream, an address or a shape")
            return False
        if self._busy[0]:
            self._books.violation("two executions in one context at once")
            return False
        arrays, memory = {}, []
        for name in self._names():
            shape, dtype = self.get_tensor_shape(name), np.dtype(self.engine.get_tensor_dtype(name).value)
            size = int(np.prod(shape)) * dtype.itemsize
            allocation = self._books.find(self._books.device, self._addresses[name], size)
            if allocation is None:
                self._books.violation(f"execute_async_v3 with {name!r} freed, or smaller than {list(shape)}")
                return False
            arrays[name] = (
                allocation.array[self._addresses[name] - allocation.address :][:size].view(dtype).reshape(shape)
            )
            memory.append(allocation)
        self._enqueue(stream, arrays, memory)
        return True

    def _enqueue(self, stream: Stream, arrays: dict[str, Any], memory: list[Any]) -> None:
        session, plan, busy = self.engine.session, self.engine.plan, self._busy
        inputs = [tensor.name for tensor in session.get_inputs()]

        def run() -> None:
            time.sleep(plan.slow)
            found = session.run(None, {name: arrays[name] for name in inputs})
            for tensor, values in zip(session.get_outputs(), found, strict=True):
                arrays[tensor.name][:] = values + np.float32(plan.wrong) if plan.wrong else values

        def idle() -> None:
            busy[0] = False

        stream.add(run, memory)
        if stream.capture is None:
            busy[0] = True
            stream.on_done.append(idle)

    def _names(self) -> list[str]:
        return [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]


def _ended(books: Books, busy: list[bool]) -> None:
    if busy[0]:
        books.violation("a context was destroyed while it ran")
