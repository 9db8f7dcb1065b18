"""Q/DQ pairs of a QDQ graph: their parameters are read for training, and the graph is rewritten for each target."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgefg.export.onnx.graph import Graph

_PAIR = ("QuantizeLinear", "DequantizeLinear")


class QuantParams(NamedTuple):
    """Parameters of a quantised activation: ``real = scale · (integer − zero)``."""

    scale: npt.NDArray[np.float32]
    """``[]``, or ``[C]``, one for each channel of ``[N, C, …]``."""
    zero: npt.NDArray[np.uint8] | npt.NDArray[np.int8]
    """The zero point; its type is that of the integers."""


def activation_params(model: onnx.ModelProto) -> dict[str, QuantParams]:
    """Return the parameters of a QDQ graph's activations by the name of the tensor that is quantised."""
    graph = Graph(model)
    found = {}
    for node in graph.nodes:
        if node.op_type != "QuantizeLinear" or node.input[0] in graph.constants:
            continue
        name, caster = node.input[0], graph.writer(node.input[0])
        # Operators that stay in FP32 in an FP16 graph have a cast behind them.
        if caster is not None and caster.op_type == "Cast" and graph.writer(caster.input[0]) is not None:
            name = caster.input[0]
        found[name] = QuantParams(graph.array(node.input[1]).astype(np.float32), graph.array(node.input[2]))
    return found


def with_own_zeros(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a QDQ graph in which no two nodes share the constant of a zero point.

    With `edgefg.runtimes.onnxruntime.EXACT_SUMS` on a CPU without VNNI, ONNX Runtime 1.32 cannot open graphs with
    shared zero points.
    """
    own = ir.from_proto(model)
    for node in own.graph:
        if node.op_type in _PAIR and len((zero := node.inputs[2]).uses()) > 1:
            name = f"{zero.name}.{node.name}"
            tensor = ir.tensor(zero.const_value.numpy(), name=name)
            copy = ir.Value(name=name, type=zero.type, shape=zero.shape, const_value=tensor)
            own.graph.register_initializer(copy)
            node.replace_input_with(2, copy)
    return _tidied(own)


def without_pairs(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the floating-point graph under a QDQ graph."""
    bare = ir.from_proto(model)
    for node in bare.graph:
        if node.op_type in _PAIR:
            node.outputs[0].replace_all_uses_with(node.inputs[0])
    return _tidied(bare)


def with_integer_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a QDQ graph whose constants are stored as int8 before their DequantizeLinear, a quarter of the size."""
    stored = ir.from_proto(model)
    for node in stored.graph:
        if node.op_type == "QuantizeLinear" and (constant := node.inputs[0]).is_initializer():
            weights, scale = (value.const_value.numpy() for value in node.inputs[:2])
            steps = np.rint(weights / scale.reshape(-1, *[1] * (weights.ndim - 1)))
            constant.const_value = ir.tensor(np.clip(steps, -128, 127).astype(np.int8), name=constant.name)
            constant.type = ir.TensorType(ir.DataType.INT8)
            node.outputs[0].replace_all_uses_with(constant)
    return _tidied(stored)


def _tidied(model: ir.Model) -> onnx.ModelProto:
    """Drop the nodes and constants that nothing reads any more."""
    RemoveUnusedNodesPass()(model)
    proto: onnx.ModelProto = ir.to_proto(model)
    return proto
