"""ONNX Runtime as the exporter uses it, to compare graphs and to measure them."""

from __future__ import annotations

from typing import Any

from edgefg.runtime import EXACT_SUMS


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
