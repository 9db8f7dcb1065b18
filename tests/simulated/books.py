"""The simulated device's books: what is allocated, alive or under way, and every use that the real one forbids.

Books belong to one process. What a child process does wrong reaches the parent's books through files in a folder whose
name travels in the environment variable, as the configuration does.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

VARIABLE = "EDGEFG_SIMULATED"
"""Environment variable that holds a `Config` as JSON, for child processes too."""
HUGE = 1 << 60


class Fault(msgspec.Struct):
    """A failure to come: the call of this name that fails, counted from now, and the error that it gives."""

    call: str
    """A CUDA runtime function (under PyCUDA too), or ``execute_async_v3``, ``create_execution_context``,
    ``deserialize_cuda_engine``, ``build_serialized_network``."""
    at: int = 1
    error: int = 700
    sticky: bool = False
    """Every later call fails too, as after an illegal address: the CUDA context is lost."""
    late: bool = False
    """The call itself succeeds; waiting for its stream fails, as a kernel's own error shows."""
    times: int = 1
    """How many calls in a row fail."""


class Config(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What is simulated, and what fails in it from the start."""

    major: int = 10
    pycuda: bool = False
    """PyCUDA is installed, and cuda-python is not."""
    gpu: str = "Simulated Orin"
    compute_capability: tuple[int, int] = (8, 7)
    memory: int = 8 << 30
    free: int = 4 << 30
    devices: int = 1
    cuda: int = 13000
    """CUDA's version, of driver and runtime."""
    driver_error: int = 0
    """What every CUDA call answers: 35 (insufficient driver), 100 (no device)."""
    faults: list[Fault] = []
    build_fails_above: int = HUGE
    """Workspace, in bytes, above which a build runs out of memory."""
    build_fails_first: int = 0
    """How many builds run out of memory, counted over all processes."""
    build_killed_above: int = HUGE
    """Workspace above which the process is killed, as Linux does on a Jetson."""
    build_killed_first: int = 0
    build_error: str = ""
    """TensorRT's reason to build nothing."""
    build_seconds: float = 0.0
    parser_error: str = ""
    refuse_timings: bool = False
    """No timing cache fits this device."""
    slow: dict[str, float] = {}
    """Seconds that a run of a plan takes longer, by what its graph holds: an operator such as ``QuantizeLinear``, or
    ``float16``; the largest counts."""
    wrong: float = 0.0
    """Added to every logit: a plan that computes something else."""
    strict_lifetimes: bool = True
    """A parent that goes before its children is told. The real bindings keep parents alive; the library under them
    does not."""
    strict_device: bool = True
    """A thread that never set its device is told, though CUDA would take device 0."""
    jitter: float = 0.0
    """Seconds that a capture stays open, and an allocation takes, at least: other threads then come between."""
    state: str = ""
    """Folder in which the processes of one simulation meet."""


def config() -> Config:
    """Read the configuration of this process."""
    return msgspec.json.decode(os.environ.get(VARIABLE, "{}"), type=Config)


def describe_config(**fields: Any) -> str:
    """Return a `Config` as the JSON of the environment variable."""
    return msgspec.json.encode(Config(**fields)).decode()


class Life:
    """An object's place in the books: its kind, and how many objects still need it."""

    __slots__ = ("children", "kind", "on_end", "parents")

    def __init__(self, kind: str, parents: tuple[Life, ...], on_end: Callable[[], None] | None) -> None:
        self.kind, self.parents, self.on_end = kind, parents, on_end
        self.children: Counter[str] = Counter()


class Books:
    """Accounts of one process."""

    def __init__(self, *, child: bool = False) -> None:
        # Reentrant: the garbage collector may end an object, and so call back, while this thread holds it.
        self.lock = threading.RLock()
        self.config = config()
        self.child = child
        self.violations: list[str] = []
        self.warnings: list[str] = []
        """What is allowed but not wise, for instance work on the default stream."""
        self.faults: list[Fault] = list(self.config.faults)
        self.sticky = 0
        self.calls: Counter[str] = Counter()
        self.alive: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        """Bytes now allocated: ``device``, ``pinned``, and ``internal`` to engines and contexts; the most is in
        `peak` under ``device bytes`` and so on."""
        self.device: Any = None
        """The simulated device that these books are about (`tests.simulated.device.Device`)."""
        self._loggers: weakref.WeakKeyDictionary[Any, Life] = weakref.WeakKeyDictionary()
        self._orphaning: list[Life] = []
        """What went before its children, but may have had to."""

    # What goes wrong, by the caller's fault or by ours

    def violation(self, text: str) -> None:
        """Note a use that the real device forbids."""
        self.violations.append(text)
        if self.child:
            self._append("violations", f"in process {os.getpid()}: {text}")

    def configure(self, **fields: Any) -> None:
        """Change the configuration, of this process and of children that start from now on."""
        self.config = msgspec.structs.replace(self.config, **fields)
        os.environ[VARIABLE] = msgspec.json.encode(self.config).decode()

    def fault(self, call: str) -> Fault | None:
        """Count a call; return the failure that it is to meet."""
        self._judge_orphans()
        with self.lock:
            self.calls[call] += 1
            if self.sticky:
                return Fault(call, error=self.sticky)
            for fault in self.faults:
                if fault.call == call:
                    fault.at -= 1
                    if fault.at <= 0:
                        fault.times -= 1
                        if fault.times <= 0:
                            self.faults.remove(fault)
                        if fault.sticky and not fault.late:
                            self.sticky = fault.error
                        return fault
        return None

    # Lives

    def born(
        self, thing: Any, kind: str, parents: tuple[Life, ...] = (), on_end: Callable[[], None] | None = None
    ) -> Life:
        """Follow an object's life: engines, contexts and so on end with their last reference."""
        life = Life(kind, parents, on_end)
        with self.lock:
            for parent in parents:
                parent.children[kind] += 1
        self.count(kind, 1)
        weakref.finalize(thing, self._died, life).atexit = False
        return life

    def life_of_logger(self, logger: Any) -> Life:
        """Return the life of a logger, which must outlast whatever logs to it."""
        life = self._loggers.get(logger)
        if life is None:
            life = self._loggers[logger] = Life("loggers", (), None)
            weakref.finalize(logger, self._died, life).atexit = False
        return life

    def count(self, kind: str, change: int) -> None:
        """Change how many of a kind are alive."""
        with self.lock:
            self.alive[kind] += change
            self.peak[kind] = max(self.peak[kind], self.alive[kind])

    def weigh(self, kind: str, change: int) -> None:
        """Change how many bytes of a kind are allocated."""
        with self.lock:
            self.bytes[kind] += change
            self.peak[f"{kind} bytes"] = max(self.peak[f"{kind} bytes"], self.bytes[kind])

    def _died(self, life: Life) -> None:
        with self.lock:
            left = {kind: count for kind, count in life.children.items() if count}
            for parent in life.parents:
                parent.children[life.kind] -= 1
        if life.kind != "loggers":
            self.count(life.kind, -1)
        if left and self.config.strict_lifetimes:
            # A function that ends releases its logger and its builder in an order that nobody chose; and a traceback
            # holds what the frames of a failure held.
            if life.kind == "loggers" or sys.exc_info()[0] is not None:
                self._orphaning.append(life)
            else:
                self._orphaned(life)
        if life.on_end is not None:
            life.on_end()

    def _orphaned(self, life: Life) -> None:
        held = ", ".join(f"{count} {kind}" for kind, count in sorted(life.children.items()) if count)
        if held:
            self.violation(f"one of the {life.kind} was released while {held} of it were alive")

    def _judge_orphans(self) -> None:
        while self._orphaning and sys.exc_info()[0] is None:
            self._orphaned(self._orphaning.pop())

    # What is read

    def left(self) -> dict[str, int]:
        """List what was not freed."""
        return {kind: count for kind, count in self.alive.items() if count}

    def builds(self) -> list[dict[str, Any]]:
        """List the builds of all processes, in order: workspace, flags, level and so on."""
        return [json.loads(line) for line in self._lines("builds")]

    def note_build(self, **facts: Any) -> int:
        """Note a build that begins; return how many went before."""
        before = len(self._lines("builds"))
        self._append("builds", json.dumps({"process": os.getpid(), **facts}))
        return before

    def all_violations(self) -> list[str]:
        """Return the violations of this process, then of its children."""
        return self.violations + self._lines("violations")

    def assert_clean(self) -> None:
        """Fail, naming everything, where something leaked or was misused."""
        self._judge_orphans()
        if self.left():
            gc.collect()  # a cycle, such as an exception's traceback, is no leak
        problems = [f"violation: {text}" for text in self.all_violations()]
        problems += [f"leak: {count} {kind}" for kind, count in self.left().items()]
        if problems:
            raise AssertionError("the simulated device's books are not clean:\n" + "\n".join(problems))

    def _file(self, name: str) -> Path | None:
        return Path(self.config.state) / f"{name}.txt" if self.config.state else None

    def _append(self, name: str, line: str) -> None:
        path = self._file(name)
        if path is not None:
            with path.open("a") as file:
                file.write(line.replace("\n", " ") + "\n")

    def _lines(self, name: str) -> list[str]:
        path = self._file(name)
        return path.read_text().splitlines() if path is not None and path.is_file() else []


@contextlib.contextmanager
def expect_violation(books: Books, words: str) -> Iterator[None]:
    """Require that the block violates a rule, with these words, and strike it off the books."""
    before = len(books.violations)
    yield
    found = [text for text in books.violations[before:] if words in text]
    assert found, f"no violation with {words!r}, only {books.violations[before:]}"
    books.violations[before:] = [text for text in books.violations[before:] if words not in text]
