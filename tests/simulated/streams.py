"""What waits in a stream, what a capture recorded, what a graph replays."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from tests.simulated.memory import Allocation

GLOBAL, THREAD_LOCAL, RELAXED = range(3)
"""Capture modes."""
_handles = itertools.count(0x10000, 0x100)


class KernelError(Exception):
    """An error that work meets on the device, told by the next wait for its stream."""

    def __init__(self, code: int, *, sticky: bool) -> None:
        super().__init__(code)
        self.code, self.sticky = code, sticky


class Running:
    """Whether an execution context is at work; shared by the context and by what is enqueued for it."""

    __slots__ = ("busy", "where")

    def __init__(self) -> None:
        self.busy = False
        self.where = ""


class Item(NamedTuple):
    """One piece of work, the memory that it reads or writes, and the contexts that it keeps busy."""

    run: Callable[[], None]
    memory: tuple[Allocation, ...] = ()
    contexts: tuple[Running, ...] = ()
    graph: Any = None


class Capture:
    """What is recorded between cudaStreamBeginCapture and cudaStreamEndCapture."""

    def __init__(self, mode: int) -> None:
        self.mode, self.thread = mode, threading.get_ident()
        self.items: list[Item] = []
        self.invalid = False


class Stream:
    """An ordered queue of work, which is done when somebody waits for it."""

    def __init__(self, device: int, *, blocking: bool, handle: int | None = None) -> None:
        self.handle = next(_handles) if handle is None else handle
        self.device, self.blocking = device, blocking
        self.lock = threading.RLock()
        self.items: list[Item] = []
        self.capture: Capture | None = None
        self.waits = 0
        """How often somebody waited."""

    def add(self, item: Item) -> None:
        """Enqueue work, or record it while a capture is on."""
        if self.capture is not None:
            self.capture.items.append(item)
            return
        for context in item.contexts:
            context.busy = True
        with self.lock:
            self.items.append(item)

    def step(self) -> KernelError | None:
        """Do the first piece of work."""
        with self.lock:
            item = self.items[0]
            try:
                item.run()
            except KernelError as exc:
                return exc
            finally:
                del self.items[0]
                for context in item.contexts:
                    context.busy = False
        return None

    def wait(self) -> KernelError | None:
        """Do all the work; return the first error, after which nothing more is done."""
        with self.lock:
            self.waits += 1
            error: KernelError | None = None
            while self.items and error is None:
                error = self.step()
            if error is not None:
                self.drop()
        return error

    def drop(self) -> None:
        """Forget the work."""
        with self.lock:
            for item in self.items:
                for context in item.contexts:
                    context.busy = False
            self.items.clear()


class Graph:
    """A captured graph, or an executable one made of it."""

    def __init__(self, items: list[Item], device: int, *, executable: bool) -> None:
        self.handle = next(_handles)
        self.items, self.device, self.executable = items, device, executable
        self.memory = {allocation for item in items for allocation in item.memory}
        self.contexts = {context for item in items for context in item.contexts}

    def run(self) -> None:
        """Replay what was captured, with the addresses that it was captured with."""
        for item in self.items:
            item.run()
