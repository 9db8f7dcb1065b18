"""The simulated device: the rules of CUDA's memory, streams, captures and graphs, as its documentation states them.

Both bindings, cuda-python and PyCUDA, are thin layers over `Device`. Its methods return an error code, then results.
Work is enqueued and carried out only when its stream is waited for, so that whoever forgets to wait reads old data.
"""

from __future__ import annotations

import threading
import time

import numpy as np

from tests.simulated import codes
from tests.simulated.books import Books
from tests.simulated.memory import Allocation, Memory
from tests.simulated.streams import GLOBAL, RELAXED, Capture, Graph, Item, KernelError, Stream

HOST_TO_HOST, HOST_TO_DEVICE, DEVICE_TO_HOST, DEVICE_TO_DEVICE, BY_ADDRESS = range(5)
_PINNED = {HOST_TO_HOST: (True, True), HOST_TO_DEVICE: (False, True), DEVICE_TO_HOST: (True, False)}
_PINNED[DEVICE_TO_DEVICE] = (False, False)
"""Per kind of copy, whether target and source are page-locked."""


class _Thread(threading.local):
    device: int | None = None
    error = 0


class Device:
    """All the GPUs of the machine, over one set of books."""

    def __init__(self, books: Books) -> None:
        self.books = books
        self.memory = Memory(books)
        self.thread = _Thread()
        self.streams: dict[int, Stream] = {}
        self.graphs: dict[int, Graph] = {}
        self.captures: list[Capture] = []
        self._default = [Stream(i, blocking=True, handle=0) for i in range(max(1, books.config.devices))]
        self._unset: set[tuple[int, str]] = set()
        books.device = self

    # What every call begins with

    def enter(self, call: str, *, unsafe: bool = False, current: bool = False) -> int:
        """Count a call; return the error that it gives before doing anything.

        Args:
            call: its name.
            unsafe: it is not observed by stream capture, hence forbidden during one.
            current: it works on the calling thread's device.
        """
        fault = self.books.fault(call)
        if self.books.config.driver_error:
            return self.books.config.driver_error
        if fault is not None and not fault.late:
            return fault.error
        if current:
            self.current(call)
        return self.forbidden(call) if unsafe and self.captures else 0

    def current(self, call: str) -> int:
        """Return the calling thread's device; note where it never chose one."""
        found = self.thread.device
        if found is None:
            key = (threading.get_ident(), call)
            if self.books.config.strict_device and key not in self._unset:
                self._unset.add(key)
                self.books.violation(f"{call} on a thread that never set its device")
            return 0
        return found

    def forbidden(self, call: str) -> int:
        """Apply the rules of cudaThreadExchangeStreamCaptureMode; a forbidden call ends the captures it concerns."""
        me, error = threading.get_ident(), 0
        for capture in list(self.captures):
            mine = capture.thread == me
            if capture.mode == RELAXED or not (mine or capture.mode == GLOBAL):
                continue
            capture.invalid = True
            whose = "this thread captures" if mine else "another thread captures in global mode"
            self.books.violation(f"{call} while {whose} a graph")
            error = codes.CAPTURE_UNSUPPORTED
        return error

    def jitter(self) -> None:
        """Give other threads time to come between."""
        if self.books.config.jitter:
            time.sleep(self.books.config.jitter)

    def set_device(self, index: int) -> int:
        if error := self.enter("cudaSetDevice"):
            return error
        if not 0 <= index < self.books.config.devices:
            return codes.INVALID_DEVICE
        self.thread.device = index
        return 0

    # Memory

    def memory_info(self) -> tuple[int, int, int]:
        error = self.enter("cudaMemGetInfo", current=True)
        return error, self.free_bytes(), self.books.config.memory

    def free_bytes(self) -> int:
        """Return what is left of the device's memory."""
        return self.books.config.free - self.books.bytes["device"] - self.books.bytes["internal"]

    def allocate(self, call: str, size: int, *, pinned: bool) -> tuple[int, int | None]:
        if error := self.enter(call, unsafe=True, current=True):
            return error, None
        if size == 0:
            return 0, 0
        if not pinned and size > self.free_bytes():
            return codes.OUT_OF_MEMORY, None
        self.jitter()
        return 0, self.memory.allocate(size, self.thread.device or 0, pinned=pinned).address

    def release(self, call: str, address: int, *, pinned: bool) -> int:
        error = self.enter(call, unsafe=True)
        if error and not self.books.sticky:
            return error
        if not address:
            return error
        allocation = self.memory.release(address, pinned=pinned)
        if allocation is None:
            self.books.violation(f"{call} of {self.memory.describe(address, 1)}, not of a live allocation of its kind")
            return error or codes.INVALID_VALUE
        if any(allocation in item.memory for stream in self.all_streams() for item in list(stream.items)):
            self.books.violation(f"{call} of memory that enqueued work still uses")
        if any(allocation in graph.memory for graph in list(self.graphs.values())):
            self.books.violation(f"{call} of memory that a graph still uses")
        return error  # after an error that sticks, the context's memory is gone all the same

    # Streams

    def all_streams(self) -> list[Stream]:
        return [*self._default, *list(self.streams.values())]

    def create_stream(self, call: str, flags: int) -> tuple[int, Stream | None]:
        if error := self.enter(call, current=True):
            return error, None
        stream = Stream(self.thread.device or 0, blocking=not flags & 1)
        self.streams[stream.handle] = stream
        self.books.count("streams", 1)
        return 0, stream

    def destroy_stream(self, handle: int) -> int:
        error = self.enter("cudaStreamDestroy")
        if error and not self.books.sticky:
            return error
        stream = self.streams.pop(handle, None)
        if stream is None:
            self.books.violation("cudaStreamDestroy of a stream that is not alive")
            return error or codes.INVALID_HANDLE
        self.books.count("streams", -1)
        if stream.items or stream.capture is not None:
            self.books.violation("cudaStreamDestroy of a stream that is busy or captures a graph")
        stream.drop()
        return error

    def stream_of(self, handle: int, call: str) -> Stream | None:
        """Return a living stream, the default one for 0; note where it is none."""
        stream = self.streams.get(handle) if handle else self._default[self.thread.device or 0]
        if stream is None:
            self.books.violation(f"{call} on a stream that is not alive")
        return stream

    def copy(self, target: int, source: int, size: int, kind: int, handle: int) -> int:
        fault = self.books.fault("cudaMemcpyAsync")
        if error := self.books.config.driver_error:
            return error
        if fault is not None and not fault.late:
            return fault.error
        stream = self.stream_of(handle, "cudaMemcpyAsync")
        if stream is None:
            return codes.INVALID_HANDLE
        if size == 0:
            return 0
        to, start = self.memory.find(target, size), self.memory.find(source, size)
        if to is None or start is None:
            self._complain_of_copy(target, source, size, to)
            return self._broken(stream, codes.INVALID_VALUE)
        if kind != BY_ADDRESS and _PINNED.get(kind) != (to.pinned, start.pinned):
            self.books.violation(f"cudaMemcpyAsync of kind {kind}, but the addresses lie the other way")
            return self._broken(stream, codes.INVALID_DIRECTION)
        into, values = to.view(target, size), start.view(source, size)
        if fault is not None:
            self.enqueue_failure(stream, fault.error, fault.sticky)
        else:
            stream.add(Item(lambda: np.copyto(into, values), (to, start)))
        return 0

    def _complain_of_copy(self, target: int, source: int, size: int, to: Allocation | None) -> None:
        role, address = ("to", target) if to is None else ("from", source)
        self.books.violation(f"cudaMemcpyAsync {role} {self.memory.describe(address, size)}")

    @staticmethod
    def _broken(stream: Stream, error: int) -> int:
        if stream.capture is not None:
            stream.capture.invalid = True
        return error

    @staticmethod
    def enqueue_failure(stream: Stream, error: int, sticky: bool) -> None:
        """Enqueue work that fails."""

        def fail() -> None:
            raise KernelError(error, sticky=sticky)

        stream.add(Item(fail))

    def synchronize(self, handle: int) -> int:
        if error := self.enter("cudaStreamSynchronize"):
            return self._after_wait(self.streams.get(handle), error)
        stream = self.stream_of(handle, "cudaStreamSynchronize")
        if error := self._cannot_be_asked(stream, "cudaStreamSynchronize"):
            return error
        assert stream is not None
        if self.captures and (error := self._mine_forbids("cudaStreamSynchronize")):
            return error
        return self._wait(stream)

    def _cannot_be_asked(self, stream: Stream | None, call: str) -> int:
        """Return why a stream's state cannot be asked for, 0 where it can; asking breaks a capture."""
        if stream is None:
            return codes.INVALID_HANDLE
        if stream.capture is not None:
            stream.capture.invalid = True
            self.books.violation(f"{call} of a stream that captures a graph")
            return codes.CAPTURE_UNSUPPORTED
        return 0

    def _mine_forbids(self, call: str) -> int:
        me = threading.get_ident()
        return self.forbidden(call) if any(capture.thread == me for capture in self.captures) else 0

    def _wait(self, stream: Stream) -> int:
        order = [stream]
        if not stream.handle:  # the legacy default stream waits for the blocking ones, and they for it
            order = [s for s in self.all_streams() if s.blocking and s.handle and s.device == stream.device] + order
        elif stream.blocking:
            order = [self._default[stream.device], stream]
        for one in order:
            if error := self._met(one.wait()):
                return error
        return 0

    def _met(self, error: KernelError | None) -> int:
        """Return the code of an error that work met, 0 for none."""
        if error is not None and error.sticky:
            self.books.sticky = error.code
        return error.code if error is not None else 0

    @staticmethod
    def _after_wait(stream: Stream | None, error: int) -> int:
        # A wait that fails has waited all the same: nothing of the stream runs any more.
        if stream is not None and stream.capture is None:
            stream.drop()
        return error

    def synchronize_device(self) -> int:
        if error := self.enter("cudaDeviceSynchronize", unsafe=True, current=True):
            return error
        mine = [stream for stream in self.all_streams() if stream.device == (self.thread.device or 0)]
        if any(stream.capture is not None for stream in mine):
            for stream in mine:
                if stream.capture is not None:
                    stream.capture.invalid = True
            self.books.violation("cudaDeviceSynchronize while a stream of the device captures a graph")
            return codes.CAPTURE_UNSUPPORTED
        errors = [self._wait(stream) for stream in mine]
        return next((error for error in errors if error), 0)

    def query(self, handle: int) -> int:
        """Do one piece of the stream's work, so that asking again and again ends."""
        if error := self.enter("cudaStreamQuery"):
            return error
        stream = self.stream_of(handle, "cudaStreamQuery")
        if error := self._cannot_be_asked(stream, "cudaStreamQuery"):
            return error
        assert stream is not None
        if not stream.items:
            stream.waits += 1
            return 0
        return self._met(stream.step()) or codes.NOT_READY

    # Captures and graphs

    def begin_capture(self, handle: int, mode: int) -> int:
        if error := self.enter("cudaStreamBeginCapture"):
            return error
        stream = self.stream_of(handle, "cudaStreamBeginCapture")
        if stream is None:
            return codes.INVALID_HANDLE
        if not handle or stream.capture is not None:
            what = "a stream that captures already" if handle else "the default stream"
            self.books.violation(f"cudaStreamBeginCapture on {what}")
            return codes.CAPTURE_UNSUPPORTED if not handle else codes.ILLEGAL_STATE
        stream.capture = Capture(mode)
        self.captures.append(stream.capture)
        self.jitter()
        return 0

    def end_capture(self, handle: int) -> tuple[int, Graph | None]:
        error = self.enter("cudaStreamEndCapture")
        stream = self.streams.get(handle)
        if stream is None or stream.capture is None:
            self.books.violation("cudaStreamEndCapture of a stream that captures nothing")
            return error or codes.ILLEGAL_STATE, None
        capture = stream.capture
        if capture.mode != RELAXED and capture.thread != threading.get_ident():
            self.books.violation("cudaStreamEndCapture on another thread than began the capture")
            return codes.CAPTURE_WRONG_THREAD, None
        stream.capture = None
        self.captures.remove(capture)
        if error or capture.invalid:
            return error or codes.CAPTURE_INVALIDATED, None
        return 0, self._keep(Graph(capture.items, stream.device, executable=False))

    def _keep(self, graph: Graph) -> Graph:
        self.graphs[graph.handle] = graph
        self.books.count("graphs", 1)
        return graph

    def graph_of(self, handle: int, call: str, *, executable: bool) -> Graph | None:
        graph = self.graphs.get(handle)
        if graph is None or graph.executable != executable:
            kind = "an executable graph" if executable else "a graph"
            self.books.violation(f"{call} of what is no {kind.partition(' ')[2]} that is alive")
            return None
        return graph

    def instantiate(self, handle: int) -> tuple[int, Graph | None]:
        if error := self.enter("cudaGraphInstantiate", current=True):
            return error, None
        graph = self.graph_of(handle, "cudaGraphInstantiate", executable=False)
        if graph is None:
            return codes.INVALID_VALUE, None
        return 0, self._keep(Graph(graph.items, graph.device, executable=True))

    def destroy_graph(self, call: str, handle: int, *, executable: bool) -> int:
        error = self.enter(call)
        if error and not self.books.sticky:
            return error
        graph = self.graph_of(handle, call, executable=executable)
        if graph is None:
            return error or codes.INVALID_VALUE
        if any(item.graph is graph for stream in self.all_streams() for item in list(stream.items)):
            self.books.violation(f"{call} of a graph that runs")
        del self.graphs[handle]
        self.books.count("graphs", -1)
        return error

    def launch(self, handle: int, stream_handle: int) -> int:
        fault = self.books.fault("cudaGraphLaunch")
        if error := self.books.config.driver_error:
            return error
        if fault is not None and not fault.late:
            return fault.error
        graph = self.graph_of(handle, "cudaGraphLaunch", executable=True)
        stream = self.stream_of(stream_handle, "cudaGraphLaunch")
        if graph is None or stream is None:
            return codes.INVALID_VALUE if stream else codes.INVALID_HANDLE
        if error := self.check_device(stream, "cudaGraphLaunch"):
            return error
        if any(allocation.freed for allocation in graph.memory):
            self.books.violation("cudaGraphLaunch of a graph whose memory was freed")
            return codes.INVALID_VALUE
        if any(context.busy for context in graph.contexts):
            self.books.violation("cudaGraphLaunch while its context is at work: two executions in one context")
            return codes.INVALID_VALUE
        if fault is not None:
            self.enqueue_failure(stream, fault.error, fault.sticky)
        else:
            stream.add(Item(graph.run, tuple(graph.memory), tuple(graph.contexts), graph))
        return 0

    def check_device(self, stream: Stream, call: str) -> int:
        """Work fails that is issued to a stream of another device than the thread's own (programming guide)."""
        if self.current(call) == stream.device:
            return 0
        self.books.violation(f"{call} on a stream of device {stream.device}; the thread's is {self.thread.device or 0}")
        return codes.INVALID_HANDLE
