"""Wrong uses of a device, each with words of the violation that must be noted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.simulated.rig import GLOBAL, IN, LOCAL, TO_DEVICE, Rig, images, in_thread, make_plan, ok


def _freed(rig: Rig) -> None:
    rig.rt.cudaFree(rig.device[0])
    assert not rig.context.execute_async_v3(int(rig.stream))


def _unset(rig: Rig) -> None:
    rig.context.set_tensor_address(rig.engine.get_tensor_name(1), 0)
    assert not rig.context.execute_async_v3(int(rig.stream))


def _small(rig: Rig) -> None:
    rig.context.set_tensor_address(rig.engine.get_tensor_name(0), ok(rig.rt.cudaMalloc(IN - 1)))
    assert not rig.context.execute_async_v3(int(rig.stream))


def _twice(rig: Rig) -> None:
    rig.enqueue()
    assert not rig.context.execute_async_v3(int(rig.stream))


def _pageable(rig: Rig) -> None:
    page = np.zeros(IN, np.uint8)
    assert rig.rt.cudaMemcpyAsync(rig.device[0], page.ctypes.data, IN, TO_DEVICE, rig.stream)[0] != 0


def _pop_busy_stream(rig: Rig) -> None:
    rig.enqueue()
    rig.rt.cudaStreamDestroy(rig.stream)


def _free_busy(rig: Rig) -> None:
    rig.enqueue()
    rig.rt.cudaFree(rig.device[0])


def _with_graph(then: Callable[[Rig], Any]) -> Callable[[Rig], None]:
    def run(rig: Rig) -> None:
        rig.infer(images()[0])
        rig.capture()
        then(rig)

    return run


def _launch_and(then: Callable[[Rig], Any]) -> Callable[[Rig], None]:
    return _with_graph(lambda rig: (ok(rig.rt.cudaGraphLaunch(rig.graph, rig.stream)), then(rig)))


def _in_capture(call: Callable[[Rig], Any], mode: int = LOCAL, *, other: bool = False) -> Callable[[Rig], None]:
    def run(rig: Rig) -> None:
        rig.infer(images()[0])
        ok(rig.rt.cudaStreamBeginCapture(rig.stream, rig.rt.cudaStreamCaptureMode(mode)))
        if other:
            in_thread(lambda: call(rig))
        else:
            call(rig)
        assert int(ok(rig.rt.cudaStreamIsCapturing(rig.stream))) == 2
        assert rig.rt.cudaStreamEndCapture(rig.stream) == (rig.rt.cudaError_t(901), None)

    return run


def _end_elsewhere(rig: Rig) -> None:
    ok(rig.rt.cudaStreamBeginCapture(rig.stream, rig.rt.cudaStreamCaptureMode(LOCAL)))
    in_thread(lambda: rig.rt.cudaStreamEndCapture(rig.stream))


def _cold_capture(rig: Rig) -> None:
    ok(rig.rt.cudaStreamBeginCapture(rig.stream, rig.rt.cudaStreamCaptureMode(LOCAL)))
    assert not rig.context.execute_async_v3(int(rig.stream))


def _raising_logger(rig: Rig) -> None:
    logger = rig.trt.ILogger()  # its log is abstract
    assert rig.trt.Runtime(logger).deserialize_cuda_engine(b"") is None


WRONG: dict[str, Callable[[Rig], Any]] = {
    "no address is set for": _unset,
    "memory that was freed": _freed,
    "out of bounds: only": _small,
    "memory of the host": lambda rig: rig.context.set_tensor_address(rig.engine[0], rig.pinned[0]),
    "neither the device's nor page-locked": lambda rig: rig.context.set_tensor_address(rig.engine[0], 12345),
    "not aligned to 256": lambda rig: rig.context.set_tensor_address(rig.engine[0], rig.device[0] + 8),
    "is no input or output": lambda rig: rig.context.set_tensor_address("nonsense", rig.device[0]),
    "the context is at work": _twice,
    "set_input_shape: the context is at work": lambda rig: (
        rig.enqueue(),
        rig.context.set_input_shape(rig.engine[0], (1, 64, 64, 3)),
    ),
    "from memory that is neither": _pageable,
    "13000 bytes out of bounds": lambda rig: rig.rt.cudaMemcpyAsync(
        rig.device[0], rig.pinned[0], 13000, TO_DEVICE, rig.stream
    ),
    "lie the other way": lambda rig: rig.rt.cudaMemcpyAsync(rig.pinned[0], rig.device[0], 16, TO_DEVICE, rig.stream),
    "stream that is busy": _pop_busy_stream,
    "cudaStreamDestroy of a stream that is not alive": lambda rig: [
        rig.rt.cudaStreamDestroy(rig.stream) for _ in range(2)
    ],
    "execute_async_v3 on a stream that is not alive": lambda rig: (
        rig.rt.cudaStreamDestroy(rig.stream),
        rig.context.execute_async_v3(int(rig.stream)),
    ),
    "cudaFree of memory that enqueued work still uses": _free_busy,
    "cudaFree of memory that was freed": lambda rig: [rig.rt.cudaFree(rig.device[0]) for _ in range(2)],
    "not of a live allocation of its kind": lambda rig: rig.rt.cudaFree(rig.pinned[0]),
    "cudaFree of memory that a graph still uses": _with_graph(lambda rig: rig.rt.cudaFree(rig.device[0])),
    "cudaFreeHost of memory that a graph still uses": _with_graph(lambda rig: rig.rt.cudaFreeHost(rig.pinned[0])),
    "a captured graph still uses it": _with_graph(lambda rig: setattr(rig, "context", None)),
    "of a graph that runs": _launch_and(lambda rig: rig.rt.cudaGraphExecDestroy(rig.graph)),
    "two executions in one context": _launch_and(lambda rig: rig.rt.cudaGraphLaunch(rig.graph, rig.stream)),
    "no executable graph that is alive": lambda rig: rig.rt.cudaGraphLaunch(77, rig.stream),
    "destroyed while it ran": lambda rig: (rig.enqueue(), setattr(rig, "context", None)),
    "engines was released while 1 contexts": lambda rig: setattr(rig, "engine", None),
    "runtimes was released while 1 engines": lambda rig: setattr(rig, "runtime", None),
    "loggers was released while": lambda rig: (setattr(rig, "logger", None), rig.rt.cudaMemGetInfo()),
    "never set its device": lambda rig: in_thread(lambda: rig.rt.cudaMalloc(8)),
    "cudaMalloc while this thread captures": _in_capture(lambda rig: rig.rt.cudaMalloc(8)),
    "cudaMalloc while another thread captures": _in_capture(lambda rig: rig.rt.cudaMalloc(8), GLOBAL, other=True),
    "create_execution_context, which allocates, while": _in_capture(lambda rig: rig.engine.create_execution_context()),
    "of a stream that captures": _in_capture(lambda rig: rig.rt.cudaStreamSynchronize(rig.stream)),
    "cudaDeviceSynchronize while": _in_capture(lambda rig: rig.rt.cudaDeviceSynchronize()),
    "on another thread than began": _end_elsewhere,
    "captured before a plain run": _cold_capture,
    "cudaStreamBeginCapture on the default stream": lambda rig: rig.rt.cudaStreamBeginCapture(0, LOCAL),
    "captures nothing": lambda rig: rig.rt.cudaStreamEndCapture(rig.stream),
    "engine_host_code_allowed": lambda rig: (
        setattr(rig.runtime, "engine_host_code_allowed", True),
        rig.runtime.deserialize_cuda_engine(make_plan()),
    ),
    "ILogger.log raised": _raising_logger,
}
