"""The simulated device's books: what is allocated, alive or under way, and every use that the real one forbids."""

from __future__ import annotations

import json
import os
import threading
import weakref
from collections import Counter
from typing import Any

import msgspec
import numpy as np

VARIABLE = "EDGEFG_SIMULATED"
"""Environment variable that holds a `Config` as JSON, for child processes too."""


class Config(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What is simulated, and what fails in it from the start."""

    major: int = 10
    gpu: str = "Simulated Orin"
    compute_capability: tuple[int, int] = (8, 7)
    memory: int = 8 << 30
    free: int = 4 << 30
    devices: int = 1
    driver_error: int = 0
    """What cudaGetDeviceCount answers: 35 (insufficient driver), 100 (no device)."""
    build_fails_above: int = 1 << 60
    """Workspace, in bytes, above which a build runs out of memory."""
    build_killed_above: int = 1 << 60
    """… and above which the process is killed, as Linux does on a Jetson."""
    build_error: str = ""
    """TensorRT's reason to build nothing."""
    parser_error: str = ""
    refuse_timings: bool = False
    slow: dict[str, float] = {}
    """Seconds that a run of a plan takes longer, by what its graph holds: ``QuantizeLinear``, ``float16``."""
    wrong: float = 0.0
    """Added to every logit: a plan that computes something else."""


def config() -> Config:
    """Read the configuration of this process."""
    return msgspec.json.decode(os.environ.get(VARIABLE, "{}"), type=Config)


class Fault(msgspec.Struct):
    """A failure to come: the call of this name that fails, counted from now, and the error that it gives."""

    call: str
    at: int = 1
    error: int = 700
    sticky: bool = False


class Allocation:
    """Memory, of the simulated device or page-locked; an address is that of ordinary memory."""

    def __init__(self, size: int) -> None:
        self.array = np.full(size, 0xCD, np.uint8)
        self.address = self.array.ctypes.data
        self.size = size
        self.pending = 0
        self.graphs = 0


class Books:
    """Accounts of one process."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.config = config()
        self.violations: list[str] = []
        self.faults: list[Fault] = []
        self.sticky = 0
        self.calls: Counter[str] = Counter()
        self.device: dict[int, Allocation] = {}
        self.pinned: dict[int, Allocation] = {}
        self.streams: dict[int, Any] = {}
        self.graphs: set[int] = set()
        self.alive: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()

    def violation(self, text: str) -> None:
        """Note a use that the real device forbids."""
        self.violations.append(text)

    def fails(self, call: str) -> int:
        """Count a call; return the error that it is to give, 0 for none."""
        with self.lock:
            self.calls[call] += 1
            if self.sticky:
                return self.sticky
            for fault in self.faults:
                if fault.call == call:
                    fault.at -= 1
                    if fault.at == 0:
                        self.faults.remove(fault)
                        self.sticky = fault.error if fault.sticky else 0
                        return fault.error
        return 0

    def born(self, thing: Any, kind: str) -> None:
        """Follow an object's life: engines, contexts and so on end with their last reference."""
        with self.lock:
            self.alive[kind] += 1
            self.peak[kind] = max(self.peak[kind], self.alive[kind])
        weakref.finalize(thing, self._died, kind)

    def _died(self, kind: str) -> None:
        with self.lock:
            self.alive[kind] -= 1

    def find(self, where: dict[int, Allocation], address: int, size: int) -> Allocation | None:
        """Return the allocation that holds ``size`` bytes at an address."""
        found = where.get(address)
        if found is not None:
            return found if size <= found.size else None
        for allocation in where.values():
            if allocation.address <= address and address + size <= allocation.address + allocation.size:
                return allocation
        return None

    def left(self) -> dict[str, int]:
        """List what was not freed."""
        kinds = {"device memory": self.device, "pinned memory": self.pinned, "streams": self.streams}
        found = {name: len(held) for name, held in kinds.items() if held}
        if self.graphs:
            found["graphs"] = len(self.graphs)
        return found | {kind: count for kind, count in self.alive.items() if count}

    def assert_clean(self) -> None:
        """Fail where something leaked or was misused."""
        assert not self.violations, self.violations
        assert not self.left(), self.left()


def describe_config(**fields: Any) -> str:
    """Return a `Config` as the JSON of the environment variable."""
    return json.dumps(msgspec.to_builtins(Config(**fields)))
