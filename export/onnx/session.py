"""ONNX Runtime as the exporter uses it, to compare graphs and to measure them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgefg.errors import ExportError, one_line
from edgefg.preprocess import UInt8Array
from edgefg.runtimes.onnxruntime import EXACT_SUMS


def open_session(model: bytes | str, *, optimise: bool = True) -> Any:
    """Return an `onnxruntime.InferenceSession` on the CPU that sums 8-bit products exactly.

    Args:
        model: a serialised graph, or the path of one.
        optimise: whether ONNX Runtime may rewrite the graph, Q/DQ pairs to 8-bit kernels above all.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry(*EXACT_SUMS)
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def graph_logits(model: bytes | str, data: Sequence[UInt8Array], *, optimise: bool = True) -> npt.NDArray[np.float32]:
    """Return the logits, ``float32 [N, classes]``, that ONNX Runtime computes with a graph.

    Args:
        model: a serialised graph, or the path of one; takes ``uint8 [batch, height, width, 3]``.
        data: batches of it.
        optimise: see `open_session`.

    Raises:
        ExportError: ONNX Runtime cannot run the graph.
    """
    try:
        session = open_session(model, optimise=optimise)
        name = session.get_inputs()[0].name
        return np.concatenate([session.run(None, {name: batch})[0] for batch in data])
    except Exception as exc:  # ONNX Runtime raises a family of its own, plain RuntimeError among them
        raise ExportError(f"ONNX Runtime cannot run the graph: {one_line(exc)[:300]}") from exc
