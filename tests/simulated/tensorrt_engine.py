"""Simulated TensorRT, the side that loads plans: Runtime and ICudaEngine. It computes with ONNX Runtime."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np

from edgefg.runtimes.onnxruntime import EXACT_SUMS
from tests.simulated.books import Books
from tests.simulated.device import Device
from tests.simulated.plan_format import VERSIONS, Plan, Shape, Version, read_plan, write_plan
from tests.simulated.tensorrt_context import IExecutionContext
from tests.simulated.tensorrt_core import (
    DataType,
    Dims,
    ILogger,
    TensorFormat,
    TensorIOMode,
    TensorLocation,
    Voice,
    nptype,
)

__all__ = ["VERSIONS", "Plan", "write_plan"]  # from plans, where tests expect them too

CONTEXT_BYTES = 1 << 20
_TYPES = {
    "tensor(uint8)": DataType.UINT8,
    "tensor(int8)": DataType.INT8,
    "tensor(float)": DataType.FLOAT,
    "tensor(float16)": DataType.HALF,
    "tensor(int32)": DataType.INT32,
    "tensor(int64)": DataType.INT64,
    "tensor(bool)": DataType.BOOL,
}


class Site:
    """What all objects of one simulated TensorRT share."""

    def __init__(self, device: Device, version: Version) -> None:
        self.device, self.books, self.version = device, device.books, version

    def allocate(self, call: str, size: int, voice: Voice) -> bool:
        """Take device memory for an engine or a context, as TensorRT does by cudaMalloc."""
        if self.device.captures and self.device.forbidden(f"{call}, which allocates,"):
            voice.error("Error Code 1: Cuda Runtime (operation not permitted when stream is capturing)")
            return False
        fault = self.books.fault(call)
        if fault is not None or size > self.device.free_bytes():
            voice.error("Error Code 1: Cuda Runtime (out of memory)")
            voice.error(f"Error Code 2: OutOfMemory (Requested size was {size} bytes.)")
            return False
        self.books.weigh("internal", size)
        return True

    def release(self, what: str, size: int) -> None:
        self.books.weigh("internal", -size)
        if self.device.captures:
            self.device.forbidden(f"the release of {what}, which frees memory,")


def hold(site: Site, thing: Any) -> Any:
    """Refer to a parent: weakly where its user must keep it alive."""
    return weakref.ref(thing) if site.books.config.strict_lifetimes else lambda: thing


class Runtime:
    """Turns plans into engines."""

    site: Site
    __slots__ = (
        "DLA_core",
        "__weakref__",
        "_life",
        "_voice",
        "engine_host_code_allowed",
        "error_recorder",
        "gpu_allocator",
        "max_threads",
        "temporary_directory",
    )

    def __init__(self, logger: ILogger) -> None:
        self._voice = Voice(self.site.books, logger)
        self._life = self.site.books.born(self, "runtimes", (self._voice.life,))
        self.engine_host_code_allowed = False
        self.error_recorder = self.gpu_allocator = self.temporary_directory = None
        self.max_threads, self.DLA_core = 1, -1

    @property
    def logger(self) -> Any:
        return self._voice.logger

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
        site, voice, books = self.site, self._voice, self.site.books
        data = bytes(memoryview(serialized_engine).cast("B"))
        device = site.device.current("deserialize_cuda_engine")
        if self.engine_host_code_allowed:
            books.violation("engine_host_code_allowed was set: a plan may then run code on the host")
        try:
            plan, onnx = read_plan(data, site.version, compatible=self.engine_host_code_allowed)
        except ValueError as exc:
            books.fault("deserialize_cuda_engine")
            voice.error(str(exc))
            return None
        if error := misfit(plan, books):
            books.fault("deserialize_cuda_engine")
            voice.error(error)
            return None
        if not site.allocate("deserialize_cuda_engine", len(onnx), voice):
            return None
        if plan.gpu != books.config.gpu:
            text = "Using an engine plan file across different models of devices is not recommended"
            books.warnings.append(text)
            voice.warn(f"{text} and is likely to affect performance or even cause errors.")
        return ICudaEngine._make(self, plan, onnx, device)


def misfit(plan: Plan, books: Books) -> str:
    """Say why a plan does not run on this device; empty where it does."""
    here = books.config.compute_capability
    fits = plan.compute_capability == here or (plan.compatible == "AMPERE_PLUS" and here >= (8, 0))
    if fits:
        return ""
    return (
        "Error Code 6: API Usage Error (The engine plan file is generated on an incompatible device, expecting compute"
        f" {here[0]}.{here[1]} got compute {plan.compute_capability[0]}.{plan.compute_capability[1]},"
        " please rebuild.)"
    )


class ICudaEngine:
    """A plan that is loaded. It may be shared by threads."""

    __slots__ = (
        "__weakref__",
        "_inputs",
        "_life",
        "_outputs",
        "_runtime",
        "_tensors",
        "_voice",
        "device",
        "error_recorder",
        "plan",
        "session",
        "site",
    )
    _inputs: Any
    _life: Any
    _outputs: Any
    _runtime: Any
    _tensors: Any
    _voice: Any
    device: Any
    error_recorder: Any
    plan: Any
    session: Any
    site: Any

    def __init__(self) -> None:
        raise TypeError("tensorrt.ICudaEngine: No constructor defined!")

    @classmethod
    def _make(cls, runtime: Runtime, plan: Plan, onnx: bytes, device: int) -> ICudaEngine:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = 1, 1, 3
        options.add_session_config_entry(*EXACT_SUMS)
        self = object.__new__(cls)
        self.site, self.plan, self.device, self.error_recorder = runtime.site, plan, device, None
        self._voice, self._runtime = runtime._voice, hold(runtime.site, runtime)
        self.session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
        self._inputs = [tensor.name for tensor in self.session.get_inputs()]
        self._outputs = [tensor.name for tensor in self.session.get_outputs()]
        self._tensors = {tensor.name: tensor for tensor in (*self.session.get_inputs(), *self.session.get_outputs())}
        site, size = self.site, len(onnx)
        parents = (runtime._life, self._voice.life)
        self._life = site.books.born(self, "engines", parents, lambda: site.release("an engine", size))
        return self

    name = property(lambda self: self.plan.name)
    num_io_tensors = property(lambda self: len(self._tensors))
    num_layers = property(lambda self: 1)
    num_optimization_profiles = property(lambda self: max(1, len(self.plan.profiles), len(self.plan.shapes)))
    device_memory_size_v2 = property(lambda self: CONTEXT_BYTES)
    refittable = property(lambda self: self.plan.stripped)

    def _wrong(self, call: str, text: str) -> None:
        self.site.books.violation(f"{call}: {text}")
        self._voice.error(f"Error Code 3: API Usage Error ({call}: {text})")

    def _known(self, name: str, call: str) -> bool:
        if name in self._tensors:
            return True
        self._wrong(call, f"{name!r} is no input or output tensor")
        return False

    def get_tensor_name(self, index: int) -> str | None:
        if 0 <= index < len(self._tensors):
            return list(self._tensors)[index]
        self._wrong("get_tensor_name", f"index {index} is out of range")
        return None

    def __getitem__(self, index: int) -> str | None:
        return self.get_tensor_name(index)

    def get_tensor_mode(self, name: str) -> Any:
        if not self._known(name, "get_tensor_mode"):
            return TensorIOMode.NONE
        return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

    def get_tensor_shape(self, name: str) -> Dims:
        return Dims(self._shape(name) if self._known(name, "get_tensor_shape") else ())

    def _shape(self, name: str) -> Shape:
        return tuple(size if isinstance(size, int) else -1 for size in self._tensors[name].shape)

    def get_tensor_dtype(self, name: str) -> Any:
        return _TYPES[self._tensors[name].type] if self._known(name, "get_tensor_dtype") else DataType.FLOAT

    def _numpy(self, name: str) -> np.dtype:
        return np.dtype(nptype(_TYPES[self._tensors[name].type]))

    def get_tensor_location(self, name: str) -> Any:
        self._known(name, "get_tensor_location")
        return TensorLocation.DEVICE

    def get_tensor_format(self, name: str, profile_index: int = 0) -> Any:
        self._known(name, "get_tensor_format")
        return TensorFormat.LINEAR

    def is_shape_inference_io(self, name: str) -> bool:
        return not self._known(name, "is_shape_inference_io")

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Dims]:
        if not self._known(name, "get_tensor_profile_shape"):
            return []
        if name not in self._inputs or not 0 <= profile_index < self.num_optimization_profiles:
            self._wrong("get_tensor_profile_shape", f"profile {profile_index} has no shapes for {name!r}")
            return []
        return [Dims(shape) for shape in self._range(name, profile_index)]

    def _range(self, name: str, profile: int) -> tuple[Shape, Shape, Shape]:
        """Return the least, usual and largest shape of an input."""
        shape = self._shape(name)
        if profile < len(self.plan.shapes) and name in self.plan.shapes[profile]:
            return self.plan.shapes[profile][name]
        if profile < len(self.plan.profiles) and shape[0] == -1:
            least, usual, most = ((batch, *shape[1:]) for batch in self.plan.profiles[profile])
            return least, usual, most
        return shape, shape, shape

    def create_execution_context(self, strategy: Any = None) -> IExecutionContext | None:
        site = self.site
        if self._runtime() is None:
            site.books.violation("create_execution_context of an engine whose runtime was released")
        if site.device.current("create_execution_context") != self.device:
            site.books.violation("create_execution_context on another device than the engine was loaded on")
            return None
        if self.plan.stripped:
            site.books.fault("create_execution_context")
            self._voice.error("Error Code 4: Internal Error (the engine is stripped of its weights; refit it first)")
            return None
        if not site.allocate("create_execution_context", CONTEXT_BYTES, self._voice):
            return None
        return IExecutionContext._make(self, hold(site, self), CONTEXT_BYTES)
