"""A right user of cuda-python and TensorRT, one step a method: tests break one rule at a time."""

from __future__ import annotations

import ctypes
import importlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgefg.export.onnx.session import open_session
from tests.conftest import TINY
from tests.simulated.books import Books
from tests.simulated.plan_format import VERSIONS, Plan, write_plan

STATIC, DYNAMIC = (TINY / name / "model.onnx" for name in ("onnx", "onnx-dynamic"))
IN, OUT, GLOBAL, LOCAL = 64 * 64 * 3, 4 * 4, 0, 1
TO_DEVICE, TO_HOST = 1, 2


def make_plan(model: Path = STATIC, major: int = 10, **fields: Any) -> bytes:
    gpu = {"gpu": "Simulated Orin", "compute_capability": (8, 7)}
    return write_plan(Plan(**(gpu | fields)), model.read_bytes(), VERSIONS[major])


def ok(result: tuple[Any, ...]) -> Any:
    """Return the value of a CUDA call that must succeed."""
    assert result[0] == 0, result
    return result[1] if len(result) > 1 else None


def images(count: int = 1) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (count, 64, 64, 3), np.uint8)


def expected(model: Path, batch: np.ndarray) -> np.ndarray:
    session = open_session(str(model))
    return np.asarray(session.run(None, {session.get_inputs()[0].name: batch})[0])


def in_thread(work: Callable[[], Any]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def make_logger(trt: Any, said: list[str]) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, msg: str) -> None:
            said.append(msg)

    return Logger()


class Rig:
    """Opens everything; `close` frees it in the right order."""

    def __init__(self, books: Books, serialized: bytes, *, ready: bool = True) -> None:
        self.books = books
        self.trt = importlib.import_module("tensorrt")
        self.rt = importlib.import_module("cuda.bindings.runtime")
        ok(self.rt.cudaSetDevice(0))
        self.said: list[str] = []
        self.logger = make_logger(self.trt, self.said)
        self.runtime = self.trt.Runtime(self.logger)
        self.engine = self.runtime.deserialize_cuda_engine(serialized)
        self.stream = ok(self.rt.cudaStreamCreateWithFlags(self.rt.cudaStreamNonBlocking))
        self.device = [ok(self.rt.cudaMalloc(size)) for size in (IN, OUT)]
        self.pinned = [ok(self.rt.cudaHostAlloc(size, 0)) for size in (IN, OUT)]
        self.context: Any = None if self.engine is None else self.engine.create_execution_context()
        self.graph: Any = None
        if ready and self.context is not None:
            for i, address in enumerate(self.device):
                assert self.context.set_tensor_address(self.engine.get_tensor_name(i), address)

    def host(self, which: int) -> np.ndarray:
        size = (IN, OUT)[which]
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.pinned[which]))

    def copy(self, kind: int) -> None:
        which = kind - 1
        pair = (self.device[0], self.pinned[0]) if kind == TO_DEVICE else (self.pinned[1], self.device[1])
        ok(self.rt.cudaMemcpyAsync(*pair, (IN, OUT)[which], self.rt.cudaMemcpyKind(kind), self.stream))

    def enqueue(self) -> None:
        self.copy(TO_DEVICE)
        assert self.context.execute_async_v3(int(self.stream))
        self.copy(TO_HOST)

    def wait(self) -> None:
        ok(self.rt.cudaStreamSynchronize(self.stream))

    def infer(self, image: np.ndarray) -> np.ndarray:
        self.host(0)[:] = image.ravel()
        if self.graph is not None:
            ok(self.rt.cudaGraphLaunch(self.graph, self.stream))
        else:
            self.enqueue()
        self.wait()
        return self.host(1).view(np.float32).copy()

    def capture(self) -> Any:
        ok(self.rt.cudaStreamBeginCapture(self.stream, self.rt.cudaStreamCaptureMode(LOCAL)))
        self.enqueue()
        captured = ok(self.rt.cudaStreamEndCapture(self.stream))
        self.graph = ok(self.rt.cudaGraphInstantiate(captured, 0))
        ok(self.rt.cudaGraphDestroy(captured))
        return self.graph

    def close(self) -> None:
        if self.graph is not None:
            ok(self.rt.cudaGraphExecDestroy(self.graph))
        self.context = None
        self.engine = None
        self.runtime = None
        for address in self.device:
            ok(self.rt.cudaFree(address))
        for address in self.pinned:
            ok(self.rt.cudaFreeHost(address))
        ok(self.rt.cudaStreamDestroy(self.stream))


class Build:
    """A right build."""

    def __init__(self, model: bytes, major: int = 10, typed: bool = True) -> None:
        self.trt = importlib.import_module("tensorrt")
        self.said: list[str] = []
        self.logger = make_logger(self.trt, self.said)
        self.builder = self.trt.Builder(self.logger)
        flag = self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        self.network = self.builder.create_network(1 << int(flag) if typed else 0)
        self.parser = self.trt.OnnxParser(self.network, self.logger)
        self.parsed = self.parser.parse(model)
        self.config = self.builder.create_builder_config()
        self.config.set_memory_pool_limit(self.trt.MemoryPoolType.WORKSPACE, 1 << 30)

    def run(self) -> bytes | None:
        plan = self.builder.build_serialized_network(self.network, self.config)
        return None if plan is None else bytes(plan)
