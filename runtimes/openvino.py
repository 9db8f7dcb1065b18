"""OpenVINO: static shapes, latency hint, f32 arithmetic, cached compiled models."""

from __future__ import annotations

import queue
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgefg.cache import cache_directory
from edgefg.errors import InferenceError, RuntimeUnavailableError, one_line
from edgefg.quiet import without_telemetry
from edgefg.runtime import TensorSpec
from edgefg.signals import kept_signal_stack


class OpenVINORuntime:
    """An OpenVINO IR. Each call takes an inference request from a pool, so that threads never share one.

    The compiled model is cached in `edgefg.cache`.
    """

    companions = (".bin",)
    extra = "openvino"
    int8_remedy = "export with --reduce-range for an x86 CPU without VNNI (avx512_vnni, avx_vnni in lscpu)"

    def __init__(self, path: Path, *, threads: int | None = None, device: str | None = None) -> None:
        try:
            with without_telemetry():
                import openvino as ov
        except ImportError as exc:
            raise RuntimeUnavailableError(
                f"{path.name} needs OpenVINO, which is not installed: pip install 'edgefg[openvino]'"
            ) from exc
        device = (device or "CPU").upper()
        config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if device == "CPU":
            # By default some CPUs compute in bf16, which is slower on small networks and less exact.
            config["INFERENCE_PRECISION_HINT"] = "f32"
            if threads is not None:
                config["INFERENCE_NUM_THREADS"] = threads
        try:
            core = ov.Core()
            if cache := cache_directory():
                core.set_property({"CACHE_DIR": str(cache)})
            with kept_signal_stack():
                self._compiled = core.compile_model(core.read_model(path), device, config)
        except RuntimeError as exc:
            raise RuntimeUnavailableError(f"OpenVINO refused {path} on {device}: {one_line(exc)}") from exc
        port = self._compiled.input(0)
        shape = tuple(None if size.is_dynamic else int(size.get_length()) for size in port.get_partial_shape())
        self.input = TensorSpec(shape, np.dtype(port.get_element_type().to_dtype()).name)
        self.version = f"openvino {ov.__version__.split('-')[0]}"
        self._path = path
        self._tensor = ov.Tensor
        self._requests: queue.LifoQueue[_Worker] = queue.LifoQueue()

    def infer(self, batch: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return the logits, ``float32 [N, classes]``, of ``uint8 [N, H, W, 3]``.

        Raises:
            InferenceError: OpenVINO failed.
        """
        # Local references: a request in flight during `close` returns to a pool that is dropped with it.
        requests, compiled = self._requests, self._compiled
        try:
            worker = requests.get_nowait()
        except queue.Empty:
            with kept_signal_stack():
                worker = _Worker(compiled)
        try:
            logits: npt.NDArray[np.float32]
            if None in self.input.shape:
                worker.request.set_input_tensor(self._tensor(np.ascontiguousarray(batch), shared_memory=True))
                worker.request.infer(share_outputs=True)
                logits = worker.request.get_output_tensor(0).data.copy()
                return logits
            # Copied into the request's own memory: a new address in every call costs the CPU plugin more than the copy.
            np.copyto(worker.input, batch)
            worker.request.infer(share_outputs=True)
            logits = worker.output.copy()
            return logits
        except RuntimeError as exc:  # all that OpenVINO raises
            raise InferenceError(f"OpenVINO failed on {self._path.name}: {one_line(exc)}") from exc
        finally:
            requests.put(worker)

    def close(self) -> None:
        """Drop the requests and the compiled model."""
        self._requests = queue.LifoQueue()
        self._compiled = None


class _Worker:
    """An inference request with views of its input and output memory, if their size is fixed."""

    def __init__(self, compiled: Any) -> None:
        self.request = compiled.create_infer_request()
        port = compiled.input(0)
        if port.get_partial_shape().is_static:
            # The tensors are kept: a view does not keep its memory alive.
            self._tensors = self.request.get_input_tensor(0), self.request.get_output_tensor(0)
            self.input: npt.NDArray[np.uint8] = self._tensors[0].data
            self.output: npt.NDArray[np.float32] = self._tensors[1].data
