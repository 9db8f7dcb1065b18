"""ONNX Runtime on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgefg.errors import InferenceError, RuntimeUnavailableError, one_line
from edgefg.runtime import TensorSpec

EXACT_SUMS = ("session.x64quantprecision", "1")
"""Session option that sums 8-bit products exactly, also on x86 CPUs without VNNI.

With 8-bit weights such a CPU then takes as long as in FP32. With 7-bit weights it stays faster, except in depthwise
layers, whose weights keep 8 bits.
"""
_DTYPES = {"tensor(uint8)": "uint8", "tensor(float)": "float32"}


class OnnxRuntime:
    """An ONNX model in ONNX Runtime's CPU provider. Several threads may run its session at once."""

    companions = ()
    extra = "onnxruntime"
    int8_remedy = ""

    def __init__(self, path: Path, *, threads: int | None = None, device: str | None = None) -> None:
        try:
            import onnxruntime
        except ImportError as exc:
            raise RuntimeUnavailableError(
                f"{path.name} needs ONNX Runtime, which is not installed: pip install 'edgefg[onnxruntime]'"
            ) from exc
        if device not in (None, "CPU", "cpu"):
            raise RuntimeUnavailableError(f"device {device!r}: edgefg runs ONNX Runtime only on the CPU")
        try:
            self._session = _open(onnxruntime, path, threads)
        except Exception as exc:  # ONNX Runtime raises a family of its own, plain RuntimeError among them
            raise RuntimeUnavailableError(f"ONNX Runtime refused {path}: {one_line(exc)}") from exc
        node = self._session.get_inputs()[0]
        shape = tuple(size if isinstance(size, int) else None for size in node.shape)
        self.input = TensorSpec(shape, _DTYPES.get(node.type, node.type))
        self.version = f"onnxruntime {onnxruntime.__version__}"
        self._input_name = node.name
        self._path = path
        # Exceptions of its own without a common base, and RuntimeError.
        kinds = vars(onnxruntime.capi.onnxruntime_pybind11_state).values()
        own = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Exception)]
        self._errors: tuple[type[Exception], ...] = (RuntimeError, *own)

    def infer(self, batch: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return the logits, ``float32 [N, classes]``, of ``uint8 [N, H, W, 3]``.

        Raises:
            InferenceError: ONNX Runtime failed.
        """
        try:
            logits: npt.NDArray[np.float32] = self._session.run(None, {self._input_name: batch})[0]
        except self._errors as exc:
            raise InferenceError(f"ONNX Runtime failed on {self._path.name}: {one_line(exc)}") from exc
        return logits

    def close(self) -> None:
        """Drop the session."""
        self._session = None


def _open(onnxruntime: Any, path: Path, threads: int | None) -> Any:
    """Return an `onnxruntime.InferenceSession` that sums exactly if ONNX Runtime can."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # every error is raised as well
    options.add_session_config_entry(*EXACT_SUMS)
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except onnxruntime.capi.onnxruntime_pybind11_state.Fail:
        # Without VNNI, ONNX Runtime 1.32 then cannot open graphs whose nodes share a zero point. edgefg writes none.
        options.add_session_config_entry(EXACT_SUMS[0], "0")
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
