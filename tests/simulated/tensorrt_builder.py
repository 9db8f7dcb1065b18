"""Simulated TensorRT: the Builder. It optimises nothing: a plan is the ONNX file behind a plan's header."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from tests.simulated.plan_format import Plan, write_plan
from tests.simulated.tensorrt_config import IBuilderConfig, IOptimizationProfile, timings_of
from tests.simulated.tensorrt_core import IHostMemory, Voice, host_memory
from tests.simulated.tensorrt_engine import Site
from tests.simulated.tensorrt_names import MemoryPoolType
from tests.simulated.tensorrt_parser import INetworkDefinition

OUT_OF_MEMORY = "out of memory"
TRAITS = ("QuantizeLinear", "float16")
"""What is looked up in the graph; any other word of `Config.slow` also where it only occurs in the file."""


class Builder:
    """Builds plans."""

    site: Site
    enums: dict[str, Any]
    __slots__ = ("__weakref__", "_life", "_voice", "error_recorder", "gpu_allocator", "max_threads")

    def __init__(self, logger: Any) -> None:
        self._voice = Voice(self.site.books, logger)
        self._life = self.site.books.born(self, "builders", (self._voice.life,))
        self.error_recorder = self.gpu_allocator = None
        self.max_threads = 1

    @property
    def logger(self) -> Any:
        return self._voice.logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        known = sum(1 << int(flag) for flag in self.enums["NetworkDefinitionCreationFlag"].__members__.values())
        if int(flags) & ~known:
            self.site.books.violation(f"create_network({flags}): flags that TensorRT {self.site.version[0]} lacks")
            self._voice.error("Error Code 3: API Usage Error (unknown network creation flags)")
        return INetworkDefinition._make(self.site, int(flags))

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig._make(self.site, self._voice, self.enums["BuilderFlag"])

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile._make()

    def is_network_supported(self, network: INetworkDefinition, config: IBuilderConfig) -> bool:
        return not any(self._problems(network, config))

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory | None:
        site, settings = self.site, self.site.books.config
        fault = site.books.fault("build_serialized_network")
        workspace = config.get_memory_pool_limit(MemoryPoolType.WORKSPACE)
        before = site.books.note_build(
            workspace=workspace,
            flags=config._names(),
            level=config.builder_optimization_level,
            timings=len(config._timings._data) if config._timings is not None else None,
            compatible=config.hardware_compatibility_level.name,
            quantised="QuantizeLinear" in network._traits,
            float16="float16" in network._traits,
        )
        if (problem := next(self._problems(network, config), "")) or fault is not None:
            self._voice.error(problem or "Error Code 2: Internal Error (Assertion failed)")
            return None
        if workspace > settings.build_killed_above or before < settings.build_killed_first:
            os.kill(os.getpid(), signal.SIGKILL)
        if config.progress_monitor is not None and not self._report(config.progress_monitor):
            return None
        time.sleep(settings.build_seconds)
        if workspace > settings.build_fails_above or before < settings.build_fails_first:
            return self._out_of_memory(workspace)
        if settings.build_error:
            self._voice.error(settings.build_error)
            return None
        if config._timings is not None and not config.get_flag(self.enums["BuilderFlag"].DISABLE_TIMING_CACHE):
            config._timings._data = timings_of(site) + b"\n" + bytes(64)
        return host_memory(write_plan(self._plan(network, config), network._onnx, site.version))

    def _out_of_memory(self, size: int) -> None:
        # The lines of a real one, in its order.
        self._voice.error(f"Error Code 1: Cuda Runtime ({OUT_OF_MEMORY})")
        self._voice.warn(f"Requested amount of GPU memory ({size} bytes) could not be allocated.")
        self._voice.error(f"Error Code 2: OutOfMemory (Requested size was {size} bytes: {OUT_OF_MEMORY})")

    def _problems(self, network: INetworkDefinition, config: IBuilderConfig) -> Iterator[str]:
        """Say what TensorRT, or this project's rules, would refuse; the caller's mistakes go on the books too."""
        typed = self.enums["NetworkDefinitionCreationFlag"].STRONGLY_TYPED
        if self.site.version[0] == 10 and not network.get_flag(typed):
            yield self._mistake("Error Code 4: the network is not strongly typed, so INT8 scales may be ignored")
        if not network._parsed:
            yield self._mistake("Error Code 4: Internal Error (Network must have at least one output)")
        dynamic = [tensor for tensor in network._inputs if -1 in tuple(tensor.shape)]
        if dynamic and not config._profiles:
            yield "Error Code 4: API Usage Error (Network has dynamic or shape inputs, but no optimization profile)"
        for i, profile in enumerate(config._profiles):
            if missing := [tensor.name for tensor in dynamic if tensor.name not in profile._shapes]:
                yield f"Error Code 4: API Usage Error (optimization profile {i} lacks {', '.join(missing)})"
            names = {tensor.name: tuple(tensor.shape) for tensor in network._inputs}
            for name, shapes in profile._shapes.items():
                fixed = names.get(name)
                if fixed is None or any(not _within(fixed, shape) for shape in shapes):
                    yield f"Error Code 4: API Usage Error (profile {i}: {name!r} {shapes} does not fit {fixed})"

    def _mistake(self, text: str) -> str:
        self.site.books.violation(f"build_serialized_network: {text}")
        return text

    def _plan(self, network: INetworkDefinition, config: IBuilderConfig) -> Plan:
        settings, flags = self.site.books.config, config._names()
        slow = [seconds for what, seconds in settings.slow.items() if _holds(network, what)]
        return Plan(
            gpu=settings.gpu,
            compute_capability=settings.compute_capability,
            compatible=config.hardware_compatibility_level.name,
            version_compatible="VERSION_COMPATIBLE" in flags,
            stripped="STRIP_PLAN" in flags,
            name=network.name,
            shapes=[dict(profile._shapes) for profile in config._profiles],  # type: ignore[arg-type]
            slow=max(slow, default=0.0),
            wrong=settings.wrong,
        )

    @staticmethod
    def _report(monitor: Any) -> bool:
        """Report phases, one within another, as TensorRT does from a thread of its own; False where told to stop."""
        going: list[bool] = []
        problems: list[Exception] = []

        def report() -> None:
            try:
                monitor.phase_start("Building Engine", None, 4)
                monitor.phase_start("Tactic Selection", "Building Engine", 2)
                going.extend(bool(monitor.step_complete("Tactic Selection", step)) for step in range(2))
                monitor.phase_finish("Tactic Selection")
                for step in range(4):
                    if all(going):
                        going.append(bool(monitor.step_complete("Building Engine", step)))
                monitor.phase_finish("Building Engine")
            except Exception as exc:
                problems.append(exc)

        thread = threading.Thread(target=report)
        thread.start()
        thread.join()
        if problems:
            raise problems[0]
        return all(going)


def _holds(network: INetworkDefinition, what: str) -> bool:
    return what in network._traits or (what not in TRAITS and what.encode() in network._onnx)


def _within(fixed: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return len(fixed) == len(shape) and all(a in (-1, b) for a, b in zip(fixed, shape, strict=True))


def platform(**answers: bool) -> dict[str, Any]:
    """Return properties that only one major has."""
    return {f"platform_has_{name}": property(lambda _, value=value: value) for name, value in answers.items()}  # type: ignore[misc]
