"""Simulated TensorRT: what a build is told: the builder's config, profiles, the timing cache, the progress monitor."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tests.simulated.tensorrt_core import Dims, IHostMemory, Insistent, Voice, host_memory
from tests.simulated.tensorrt_engine import Site
from tests.simulated.tensorrt_names import HardwareCompatibilityLevel, MemoryPoolType, ProfilingVerbosity

_TIMINGS = b"simulated timings\n"


class ITimingCache:
    """Measured tactics; it fits the device and the TensorRT that it was made with."""

    __slots__ = ("__weakref__", "_data")
    _data: Any

    def __init__(self) -> None:
        raise TypeError("tensorrt.ITimingCache: No constructor defined!")

    @classmethod
    def _make(cls, data: bytes) -> ITimingCache:
        self = object.__new__(cls)
        self._data = data
        return self

    def serialize(self) -> IHostMemory:
        return host_memory(self._data)

    def reset(self) -> bool:
        self._data = b""
        return True

    def combine(self, input_cache: ITimingCache, ignore_mismatch: bool) -> bool:
        fits = ignore_mismatch or not self._data or input_cache._data[:200] == self._data[:200]
        self._data = self._data or (input_cache._data if fits else b"")
        return fits


def timings_of(site: Site) -> bytes:
    """Return the header of a cache that fits."""
    facts = {"gpu": site.books.config.gpu, "sm": site.books.config.compute_capability, "tensorrt": site.version}
    return _TIMINGS + json.dumps(facts).encode()


class IOptimizationProfile:
    """The sizes that a network's inputs may take."""

    __slots__ = ("__weakref__", "_shapes", "extra_memory_target")
    _shapes: dict[str, tuple[tuple[int, ...], ...]]
    extra_memory_target: Any

    def __init__(self) -> None:
        raise TypeError("tensorrt.IOptimizationProfile: No constructor defined!")

    @classmethod
    def _make(cls) -> IOptimizationProfile:
        self = object.__new__(cls)
        self._shapes = {}
        self.extra_memory_target = 1.0
        return self

    def set_shape(self, input: str, min: Sequence[int], opt: Sequence[int], max: Sequence[int]) -> None:
        shapes = tuple(tuple(int(size) for size in shape) for shape in (min, opt, max))
        if len({len(shape) for shape in shapes}) != 1 or not all(
            0 <= a <= b <= c for a, b, c in zip(*shapes, strict=True)
        ):
            raise ValueError(f"set_shape: min <= opt <= max does not hold for {input!r}: {shapes} (simulated)")
        self._shapes[input] = shapes

    def get_shape(self, input: str) -> list[Dims]:
        return [Dims(shape) for shape in self._shapes[input]]

    def __bool__(self) -> bool:
        return bool(self._shapes)


class IProgressMonitor(metaclass=Insistent):
    """Base of the monitors that callers write; called from TensorRT's own threads."""

    __slots__ = ("__weakref__", "_ready")

    def __init__(self) -> None:
        self._ready = True

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        raise RuntimeError('Tried to call pure virtual function "IProgressMonitor::phaseStart"')

    def step_complete(self, phase_name: str, step: int) -> bool:
        raise RuntimeError('Tried to call pure virtual function "IProgressMonitor::stepComplete"')

    def phase_finish(self, phase_name: str) -> None:
        raise RuntimeError('Tried to call pure virtual function "IProgressMonitor::phaseFinish"')


class IBuilderConfig:
    """How to build."""

    __slots__ = (
        "__weakref__",
        "_flags",
        "_kinds",
        "_level",
        "_pools",
        "_profiles",
        "_site",
        "_timings",
        "_voice",
        "avg_timing_iterations",
        "hardware_compatibility_level",
        "max_aux_streams",
        "profile_stream",
        "profiling_verbosity",
        "progress_monitor",
    )
    _flags: Any
    _kinds: Any
    _level: Any
    _pools: Any
    _profiles: list[IOptimizationProfile]
    _site: Any
    _timings: Any
    _voice: Any
    avg_timing_iterations: Any
    hardware_compatibility_level: Any
    max_aux_streams: Any
    profile_stream: Any
    profiling_verbosity: Any
    progress_monitor: Any

    def __init__(self) -> None:
        raise TypeError("tensorrt.IBuilderConfig: No constructor defined!")

    @classmethod
    def _make(cls, site: Site, voice: Voice, kinds: Any) -> IBuilderConfig:
        self = object.__new__(cls)
        self._site, self._voice, self._kinds = site, voice, kinds
        self._flags = 1 << int(kinds.TF32)
        self._pools = {MemoryPoolType.WORKSPACE: site.books.config.memory}
        self._profiles = []
        self._level, self._timings = 3, None
        self.avg_timing_iterations, self.max_aux_streams, self.profile_stream = 1, 0, 0
        self.hardware_compatibility_level = HardwareCompatibilityLevel.NONE
        self.profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
        self.progress_monitor = None
        return self

    num_optimization_profiles = property(lambda self: len(self._profiles))

    @property
    def flags(self) -> int:
        return self._flags

    @flags.setter
    def flags(self, value: int) -> None:
        self._flags = int(value)

    @property
    def builder_optimization_level(self) -> int:
        return self._level

    @builder_optimization_level.setter
    def builder_optimization_level(self, value: int) -> None:
        if not 0 <= int(value) <= 5:
            self._site.books.violation(f"builder_optimization_level {value}: 0 to 5 are valid")
            self._voice.error(f"Error Code 3: API Usage Error (optimization level {value})")
            return
        self._level = int(value)

    def _known(self, flag: Any) -> int:
        if not isinstance(flag, self._kinds):
            raise TypeError(f"incompatible function arguments: needed a BuilderFlag, got {flag!r} (simulated)")
        return int(flag)

    def set_flag(self, flag: Any) -> None:
        self._flags |= 1 << self._known(flag)

    def clear_flag(self, flag: Any) -> None:
        self._flags &= ~(1 << self._known(flag))

    def get_flag(self, flag: Any) -> bool:
        return bool(self._flags >> self._known(flag) & 1)

    def _names(self) -> list[str]:
        return [name for name, flag in self._kinds.__members__.items() if self._flags >> int(flag) & 1]

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        if not isinstance(pool, MemoryPoolType):
            raise TypeError(f"incompatible function arguments: needed a MemoryPoolType, got {pool!r} (simulated)")
        if pool_size < 0:
            raise TypeError("set_memory_pool_limit(): incompatible function arguments (a negative size, simulated)")
        if pool is MemoryPoolType.WORKSPACE and pool_size > self._site.books.config.memory:
            self._voice.error("Error Code 9: Internal Error (the pool is larger than the device's memory; ignored)")
            return
        self._pools[pool] = int(pool_size)

    def get_memory_pool_limit(self, pool: Any) -> int:
        return self._pools.get(pool, 0)

    def create_timing_cache(self, serialized_timing_cache: Any) -> ITimingCache:
        return ITimingCache._make(bytes(memoryview(serialized_timing_cache).cast("B")))

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if not isinstance(cache, ITimingCache):
            raise TypeError(f"incompatible function arguments: needed an ITimingCache, got {cache!r} (simulated)")
        if ignore_mismatch:
            self._site.books.violation("set_timing_cache with ignore_mismatch")
        fits = not cache._data or cache._data.startswith(timings_of(self._site))
        if not fits or (cache._data and self._site.books.config.refuse_timings):
            self._voice.error("Error Code 6: API Usage Error (the timing cache is of another device or is corrupt)")
            return False
        self._timings = cache
        return True

    def get_timing_cache(self) -> ITimingCache | None:
        return self._timings

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        if not profile:
            self._voice.error("Error Code 4: Internal Error (the optimization profile is empty)")
            return -1
        self._profiles.append(profile)
        return len(self._profiles) - 1
