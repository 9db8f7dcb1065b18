"""FP16 for engines that compute in the types of the graph: TensorRT's strongly typed networks, OpenVINO's GPUs.

Of an FP32 graph everything is cast except the nodes of `edgefg.export.onnx.fp16_blocklist`. Of a QDQ graph the
floating-point part is cast, including scales and pooling, except steep operators. The uint8 input still feeds one Cast,
now to FP16, which holds every level exactly. The logits are FP32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir
from onnx import numpy_helper, version_converter
from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass

from edgefg.errors import ExportError, one_line
from edgefg.export.onnx.fp16_blocklist import fp16_blocklist, fp32_tensors
from edgefg.export.onnx.graph import Graph, name_of
from edgefg.export.onnx.rules import INPUT
from edgefg.preprocess import UInt8Array
from edgefg.quiet import quiet

_GREATEST = float(np.finfo(np.float16).max)
_LEAST_NORMAL = float(np.finfo(np.float16).smallest_normal)
# The first whose QuantizeLinear takes FP16 scales.
_OPSET = 19
# ONNX Runtime turns a bias into integers, `bias / (input scale · weight scale)`, in the graph's own type: in FP16 that
# overflows beyond 65504, and the logits are garbage (WeightBiasQuantization, 1.32). Both numbers keep clear of it.
_MOST_BIAS_STEPS = 60_000
_LEAST_PRODUCT = 2.0**-22
# Other images may have larger activations.
_HEADROOM = 2.0


def to_half(source: Path, target: Path, data: Sequence[UInt8Array]) -> None:
    """Write the FP16 form of an FP32 ONNX file, by ONNX Runtime's converter.

    Args:
        source: FP32 ONNX of ``uint8 [batch, height, width, 3]``.
        target: where to write.
        data: batches of images with which the range of activations is measured.

    Raises:
        ExportError: a weight or an activation is beyond FP16's range, or the converter failed.
    """
    model = onnx.load(source)
    graph = Graph(model)
    kept = fp16_blocklist(graph, means=True)
    half = _cast(model, kept)
    if overflow := activation_overflow(source, data, beside=fp32_tensors(graph, kept)):
        raise ExportError(overflow)
    target.write_bytes(half.SerializeToString())


def activation_overflow(source: Path, data: Sequence[UInt8Array], *, beside: Collection[str] = ()) -> str:
    """Describe an activation of an FP32 ONNX file that comes near the end of FP16's range; empty if none does.

    Those named in ``beside`` are exempt. No CPU engine would show the overflow: ONNX Runtime and OpenVINO compute FP16
    graphs in FP32 and drop the casts in between.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="edgefg-") as folder, quiet():
            from onnxruntime.quantization import create_calibrator

            tool = create_calibrator(source, None, str(Path(folder) / "augmented.onnx"))
            tool.collect_data(BatchReader(data))
            ranges: dict[str, Any] = dict(tool.compute_data().items())
    except Exception as exc:  # ONNX Runtime raises a family of its own and Python's
        raise ExportError(f"the network's activations could not be measured: {one_line(exc)[:300]}") from exc
    for name, found in ranges.items():
        if name in beside:
            continue
        largest = max(float(np.abs(limit).max()) for limit in found.range_value)
        if not largest <= _GREATEST / _HEADROOM:
            return f"activations of {name} reach {largest:g}, allowed are {_GREATEST / _HEADROOM:g}; keep FP32"
    return ""


class BatchReader:
    """Hands batches to ONNX Runtime's calibrators."""

    def __init__(self, data: Iterable[UInt8Array]) -> None:
        self._data = iter(data)

    def get_next(self) -> dict[str, UInt8Array] | None:
        """Return the next batch, or None after the last one."""
        batch = next(self._data, None)
        return None if batch is None else {INPUT: batch}


def rest_to_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a QDQ graph with what stays floating point, and every scale, in FP16.

    Scales are rounded up, since a smaller one would cut off the extremes, and to at least 2⁻¹⁴, below which FP16 loses
    digits. Weights are stored before their QuantizeLinear, so a larger scale quantises them again. If a channel's
    bias is more than `_MOST_BIAS_STEPS` of its steps, its weights get coarser ones: next to such a bias the finer
    ones made no difference (134 of EfficientNet-Lite0's 22,008 channels).

    Raises:
        ExportError: a weight or scale is beyond FP16's range, or the converter failed.
    """
    model = version_converter.convert_version(model, max(_OPSET, Graph(model).opset))
    graph = Graph(model)
    for name, scale in _half_scales(graph).items():
        tensor = graph.constants[name]
        tensor.CopyFrom(numpy_helper.from_array(scale.reshape(tuple(tensor.dims)).astype(np.float32), name))
    return _cast(model, fp16_blocklist(Graph(model), means=False))


def _half_scales(graph: Graph) -> dict[str, npt.NDArray[np.float64]]:
    """Return the new scales of a graph, by name."""
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


def _cast(model: onnx.ModelProto, kept: set[str]) -> onnx.ModelProto:
    """Return the graph in FP16, with the nodes whose first outputs are named in ``kept`` in FP32."""
    graph = Graph(model)
    for name, tensor in graph.constants.items():
        if tensor.data_type != onnx.TensorProto.FLOAT or all(node.output[0] in kept for node in graph.readers(name)):
            continue
        largest = float(np.abs(graph.array(name)).max(initial=0.0))
        # The converter would clip it with only a warning.
        if not largest <= _GREATEST:
            raise ExportError(_beyond(name, largest))
    blocked = [node for node in graph.nodes if node.output[0] in kept]
    for node in blocked:
        node.name = name_of(node)  # the converter looks for names
    # The converter infers types itself. A constant with a noted type would go to FP16 and back before an FP32 node.
    del model.graph.value_info[:]
    try:
        with quiet():
            from onnxruntime.transformers.float16 import convert_float_to_float16

            names = [node.name for node in blocked]
            half = convert_float_to_float16(model, keep_io_types=True, node_block_list=names)
            half = _without_detours(half, set(names))
        onnx.checker.check_model(half, full_check=True)
    except Exception as exc:  # the converter and the checker raise what they come upon
        raise ExportError(f"the network could not be cast to FP16: {one_line(exc)[:300]}") from exc
    return half


def _without_detours(model: onnx.ModelProto, kept: set[str]) -> onnx.ModelProto:
    """Connect nodes in FP32 directly, where the converter casts to FP16 and back, and sort the nodes."""
    graph = onnx_ir.from_proto(model)
    for back in [node for node in graph.graph if node.op_type == "Cast" and not node.outputs[0].is_graph_output()]:
        there = _writer(back)
        writer = _writer(there) if there is not None and there.op_type == "Cast" else None
        if there is not None and there.inputs[0] is not None and writer is not None and writer.name in kept:
            back.outputs[0].replace_all_uses_with(there.inputs[0])
    RemoveUnusedNodesPass()(graph)
    TopologicalSortPass()(graph)  # the converter appends its casts
    connected: onnx.ModelProto = onnx_ir.to_proto(graph)
    del connected.graph.value_info[:]  # types that anyone can infer, and that a later change would contradict
    return connected


def _writer(node: onnx_ir.Node) -> onnx_ir.Node | None:
    """Return the node that writes a node's first input."""
    return None if node.inputs[0] is None else node.inputs[0].producer()


def _beyond(name: str, largest: float) -> str:
    return f"{name} holds {largest:g}, FP16 reaches {_GREATEST:g}; keep FP32"
