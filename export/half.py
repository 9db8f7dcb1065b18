"""FP16 for engines that compute in the types that a graph has: TensorRT's strongly typed networks, OpenVINO's GPUs.

Of an FP32 graph everything is cast, for OpenVINO with `SENSITIVE` operators left in FP32; of a QDQ graph what stays
floating point, scales included. The uint8 input still feeds one Cast, now to FP16, which holds every level exactly; the
logits leave as FP32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper, version_converter

from edgefg.errors import ExportError, one_line
from edgefg.export.graph import Graph
from edgefg.export.quiet import quiet
from edgefg.export.rules import INPUT
from edgefg.preprocess import UInt8Array

_GREATEST = float(np.finfo(np.float16).max)
_LEAST_NORMAL = float(np.finfo(np.float16).smallest_normal)
# The first whose QuantizeLinear takes FP16 scales.
_OPSET = 19
# ONNX Runtime turns a bias into integers, `bias / (input scale · weight scale)`, in the graph's own type: in FP16 that
# overflows beyond 65504, and the logits are garbage (WeightBiasQuantization, 1.32). Both numbers keep clear of it.
_MOST_BIAS_STEPS = 60_000
_LEAST_PRODUCT = 2.0**-22
# Other images reach further than those that were looked at.
_HEADROOM = 2.0


SENSITIVE = (
    "Div", "Exp", "GlobalAveragePool", "GroupNormalization", "InstanceNormalization", "LayerNormalization", "Log",
    "LogSoftmax", "LpNormalization", "Pow", "Reciprocal", "ReduceL2", "ReduceLogSumExp", "ReduceMean", "ReduceSum",
    "ReduceSumSquare", "Softmax", "Sqrt",
)  # fmt: skip
"""Sums over many values, and what overflows, vanishes or has a steep slope near zero."""


def to_half(source: Path, target: Path, data: Sequence[UInt8Array], *, full: Sequence[str] = ()) -> None:
    """Write the FP16 form of an FP32 ONNX file, by ONNX Runtime's converter.

    Args:
        source: FP32 ONNX of ``uint8 [batch, height, width, 3]``.
        target: where to write.
        data: batches of images to look for activations beyond FP16's range.
        full: operators that stay in FP32.

    Raises:
        ExportError: a weight or an activation is beyond FP16's range, or the converter failed.
    """
    half = _cast(onnx.load(source), full)
    if overflow := activation_overflow(source, data):
        raise ExportError(overflow)
    target.write_bytes(half.SerializeToString())


def activation_overflow(source: Path, data: Sequence[UInt8Array]) -> str:
    """Say which activation of an FP32 ONNX file comes near the end of FP16's range; empty where none does.

    No CPU engine would show it: ONNX Runtime and OpenVINO compute FP16 graphs in FP32 and drop the casts in between.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="edgefg-") as folder, quiet():
            from onnxruntime.quantization import create_calibrator

            tool = create_calibrator(source, None, str(Path(folder) / "augmented.onnx"))
            tool.collect_data(Batches(data))
            ranges: dict[str, Any] = dict(tool.compute_data().items())
    except Exception as exc:  # ONNX Runtime raises a family of its own and Python's
        raise ExportError(f"the network's activations could not be measured: {one_line(exc)[:300]}") from exc
    for name, found in ranges.items():
        largest = max(float(np.abs(limit).max()) for limit in found.range_value)
        if not largest <= _GREATEST / _HEADROOM:
            return f"activations of {name} reach {largest:g}, allowed are {_GREATEST / _HEADROOM:g}; keep FP32"
    return ""


class Batches:
    """Hands batches to ONNX Runtime's calibrators by their protocol."""

    def __init__(self, data: Iterable[UInt8Array]) -> None:
        self._data = iter(data)

    def get_next(self) -> dict[str, UInt8Array] | None:
        """Return the next batch, or None after the last one."""
        batch = next(self._data, None)
        return None if batch is None else {INPUT: batch}


def rest_to_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a QDQ graph with what stays floating point, and every scale, in FP16.

    Scales are rounded up, since a smaller one would cut off the extremes, and to at least 2⁻¹⁴, below which FP16 loses
    digits. Weights are stored before their QuantizeLinear, so a larger scale quantises them anew. Where a channel's
    bias counts more than `_MOST_BIAS_STEPS` of its steps, its weights get coarser ones: next to such a bias the finer
    ones made no difference (134 of EfficientNet-Lite0's 22,008 channels).

    Raises:
        ExportError: a weight or scale is beyond FP16's range, or the converter failed.
    """
    model = version_converter.convert_version(model, max(_OPSET, Graph(model).opset))
    graph = Graph(model)
    for name, scale in _half_scales(graph).items():
        tensor = graph.constants[name]
        tensor.CopyFrom(numpy_helper.from_array(scale.reshape(tuple(tensor.dims)).astype(np.float32), name))
    return _cast(model)


def _half_scales(graph: Graph) -> dict[str, npt.NDArray[np.float64]]:
    """Return what each scale of a graph becomes, by name."""
    pairs = [node for node in graph.nodes if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    scales = {node.input[1]: _round_up(node.input[1], graph.array(node.input[1])) for node in pairs}
    for node in graph.nodes:
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm") or not set(node.input[2:]) & set(graph.constants):
            continue  # without a bias
        data, weights = (graph.writer(name) for name in node.input[:2])
        if data is None or weights is None or {data.op_type, weights.op_type} != {"DequantizeLinear"}:
            continue  # in floating point altogether
        name, bias = weights.input[1], np.abs(graph.array(node.input[2]).astype(np.float64)).ravel()
        least = np.maximum(bias / _MOST_BIAS_STEPS, _LEAST_PRODUCT) / scales[data.input[1]]
        if least.size != scales[name].size:  # one scale for all channels
            least = least.max()
        scales[name] = _round_up(name, np.maximum(scales[name], least))
    return scales


def _round_up(name: str, scale: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Return the least normal FP16 numbers that are not below a scale."""
    wanted = np.maximum(scale.astype(np.float64), _LEAST_NORMAL)
    if not (wanted <= _GREATEST).all():
        raise ExportError(_beyond(name, float(wanted.max())))
    half = wanted.astype(np.float16)
    return np.where(half < wanted, np.nextafter(half, np.float16(_GREATEST)), half).astype(np.float64)


def _cast(model: onnx.ModelProto, full: Sequence[str] = ()) -> onnx.ModelProto:
    for tensor in model.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        largest = float(np.abs(numpy_helper.to_array(tensor)).max(initial=0.0))
        # The converter would cut it off with no more than a warning.
        if not largest <= _GREATEST:
            raise ExportError(_beyond(tensor.name, largest))
    # The converter infers types itself; where a constant has one noted, it goes to FP16 and back before an FP32 node.
    del model.graph.value_info[:]
    try:
        with quiet():
            from onnxruntime.quantization.onnx_model import ONNXModel
            from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

            blocked = [*DEFAULT_OP_BLOCK_LIST, *full]
            half = ONNXModel(convert_float_to_float16(model, keep_io_types=True, op_block_list=blocked))
            half.topological_sort()  # the converter appends its casts
        onnx.checker.check_model(half.model, full_check=True)
    except Exception as exc:  # the converter and the checker raise what they come upon
        raise ExportError(f"the network could not be cast to FP16: {one_line(exc)[:300]}") from exc
    cast: onnx.ModelProto = half.model
    return cast


def _beyond(name: str, largest: float) -> str:
    return f"{name} holds {largest:g}, FP16 reaches {_GREATEST:g}; keep FP32"
