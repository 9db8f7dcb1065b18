"""Simulated TensorRT, the side that builds plans: Builder, OnnxParser, the config. It optimises nothing."""

from __future__ import annotations

import enum
import os
import signal
import types
from typing import Any

import onnx

from tests.simulated.books import Books
from tests.simulated.tensorrt_engine import Plan, Severity, tell, write_plan

_TIMINGS = b"simulated timings of "


class _Members:
    """Enumerations as pybind makes them: members of a class, in the order of their numbers."""

    @staticmethod
    def of(name: str, *members: str) -> Any:
        return enum.IntEnum(name, {member: i for i, member in enumerate(members)})


def enums(major: int) -> dict[str, Any]:
    """Return the enumerations that a major version has."""
    flags = ["DEBUG", "TF32", "VERSION_COMPATIBLE", "STRIP_PLAN"]
    creation = ["STRONGLY_TYPED"] if major == 11 else ["EXPLICIT_BATCH", "STRONGLY_TYPED"]
    return {
        "BuilderFlag": _Members.of("BuilderFlag", *flags, *(["FP16", "INT8"] if major == 10 else [])),
        "NetworkDefinitionCreationFlag": _Members.of("NetworkDefinitionCreationFlag", *creation),
        "MemoryPoolType": _Members.of("MemoryPoolType", "WORKSPACE", "TACTIC_DRAM"),
        "HardwareCompatibilityLevel": _Members.of(
            "HardwareCompatibilityLevel", "NONE", "AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY"
        ),
    }


class IHostMemory(bytes):
    """Of a real one only the buffer protocol may be relied on; Python 3.11 has no other way to offer that."""

    @property
    def nbytes(self) -> int:
        return len(self)


class ITensor:
    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self.name, self.shape = name, shape


class INetworkDefinition:
    def __init__(self, flags: int) -> None:
        self.flags = flags
        self.onnx = b""
        self.inputs: list[ITensor] = []

    def get_input(self, index: int) -> ITensor:
        return self.inputs[index]


class ParserError:
    def __init__(self, node: str, operator: str, text: str) -> None:
        self._parts = node, operator, text

    def node_name(self) -> str:
        return self._parts[0]

    def node_operator(self) -> str:
        return self._parts[1]

    def desc(self) -> str:
        return self._parts[2]


class OnnxParser:
    books: Books

    def __init__(self, network: INetworkDefinition, logger: Any) -> None:
        self._network, self._logger = network, logger
        self._errors: list[ParserError] = []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]

    def parse(self, model: bytes) -> bool:
        try:
            graph = onnx.load_from_string(model).graph
        except Exception:
            self._errors.append(ParserError("", "", "Failed to parse ONNX model"))
            return False
        if text := self.books.config.parser_error:
            self._errors.append(ParserError("node_1", "Conv", text))
        for value in graph.input:
            sizes = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim)
            self._network.inputs.append(ITensor(value.name, sizes))
            readers = [node.op_type for node in graph.node if value.name in node.input]
            if value.type.tensor_type.elem_type == onnx.TensorProto.UINT8 and readers != ["Cast"]:
                self._errors.append(ParserError(value.name, "Input", "UINT8 network input must feed a Cast"))
        self._network.onnx = model
        return not self._errors


class ITimingCache:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> IHostMemory:
        return IHostMemory(self.data)


class IOptimizationProfile:
    def __init__(self) -> None:
        self.shapes: dict[str, tuple[Any, Any, Any]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        self.shapes[input] = (tuple(min), tuple(opt), tuple(max))


class IProgressMonitor:
    def __init__(self) -> None:
        self.initialised = True


class IBuilderConfig:
    def __init__(self, books: Books) -> None:
        self._books = books
        self.flags = {"TF32"}
        self.workspace = books.config.memory
        self.profiles: list[IOptimizationProfile] = []
        self.builder_optimization_level = 3
        self.hardware_compatibility_level: Any = None
        self.progress_monitor: Any = None
        self.timings: ITimingCache | None = None

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        if pool.name == "WORKSPACE":
            self.workspace = pool_size

    def set_flag(self, flag: Any) -> None:
        self.flags.add(flag.name)

    def clear_flag(self, flag: Any) -> None:
        self.flags.discard(flag.name)

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
        return ITimingCache(bytes(serialized_timing_cache))

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if ignore_mismatch:
            self._books.violation("set_timing_cache with ignore_mismatch")
        mine = _TIMINGS + self._books.config.gpu.encode()
        if cache.data and (cache.data != mine or self._books.config.refuse_timings):
            return False
        self.timings = cache
        return True

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        for least, usual, most in profile.shapes.values():
            if not 1 <= least[0] <= usual[0] <= most[0]:
                return -1
        self.profiles.append(profile)
        return len(self.profiles) - 1


class Builder:
    books: Books
    version: tuple[int, int, int, int]

    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self.books.born(self, "builders")

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        return INetworkDefinition(flags)

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig(self.books)

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory | None:
        settings, error = self.books.config, ""
        typed = 1 << int(enums(self.version[0])["NetworkDefinitionCreationFlag"].STRONGLY_TYPED)
        dynamic = any(-1 in tensor.shape for tensor in network.inputs)
        if config.workspace > settings.build_killed_above:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.version[0] == 10 and not network.flags & typed:
            error = "simulated: only strongly typed networks keep the precision of a QDQ graph"
        elif dynamic and not config.profiles:
            error = "Error Code 4: Network has dynamic inputs, but no optimization profile has been defined"
        elif config.workspace > settings.build_fails_above:
            error = "Error Code 1: Cuda Runtime (out of memory)"
        elif settings.build_error:
            error = settings.build_error
        if config.progress_monitor is not None and not self._report(config.progress_monitor):
            return None
        if error:
            tell(self._logger, Severity.ERROR, error)
            return None
        if config.timings is not None:
            config.timings.data = _TIMINGS + settings.gpu.encode()
        return IHostMemory(write_plan(self._plan(network, config), network.onnx, self.version))

    def _plan(self, network: INetworkDefinition, config: IBuilderConfig) -> Plan:
        settings = self.books.config
        level = config.hardware_compatibility_level
        return Plan(
            gpu=settings.gpu,
            compute_capability=settings.compute_capability,
            compatible=level.name if level is not None else "NONE",
            profiles=[
                (least[0], usual[0], most[0])
                for profile in config.profiles
                for least, usual, most in profile.shapes.values()
            ],
            slow=max((time for word, time in settings.slow.items() if word.encode() in network.onnx), default=0.0),
            wrong=settings.wrong,
        )

    @staticmethod
    def _report(monitor: Any) -> bool:
        assert monitor.initialised, "IProgressMonitor.__init__ was not called"
        monitor.phase_start("Building Engine", None, 4)
        monitor.phase_start("Tactic Selection", "Building Engine", 2)
        monitor.step_complete("Tactic Selection", 0)
        monitor.phase_finish("Tactic Selection")
        going = all(monitor.step_complete("Building Engine", step) for step in range(4))
        monitor.phase_finish("Building Engine")
        return going


def add_builder(module: types.ModuleType, books: Books, version: tuple[int, int, int, int]) -> None:
    """Put this side's names into the simulated module."""
    for name, members in enums(version[0]).items():
        setattr(module, name, members)
    for kind in (INetworkDefinition, IHostMemory, ITimingCache, IProgressMonitor, IBuilderConfig, ParserError):
        setattr(module, kind.__name__, kind)
    for kind in (IOptimizationProfile, ITensor):
        setattr(module, kind.__name__, kind)
    module.Builder = type("Builder", (Builder,), {"books": books, "version": version})
    module.OnnxParser = type("OnnxParser", (OnnxParser,), {"books": books})
