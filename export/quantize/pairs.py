"""Q/DQ pairs of a QDQ graph: their parameters are read for training, and the graph is rewritten for each target."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

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

    ONNX Runtime 1.32 cannot open shared ones with `edgefg.runtimes.onnxruntime.EXACT_SUMS` on a CPU that needs it.
    """
    own = onnx.ModelProto()
    own.CopyFrom(model)
    constants = {tensor.name: tensor for tensor in own.graph.initializer}
    seen = set()
    for node in own.graph.node:
        if node.op_type in _PAIR and len(node.input) > 2:
            name = node.input[2]
            if name in seen:
                node.input[2] = f"{name}.{node.name}"
                own.graph.initializer.add().CopyFrom(constants[name])
                own.graph.initializer[-1].name = node.input[2]
            seen.add(name)
    return own


def without_pairs(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the floating-point graph under a QDQ graph."""
    graph = Graph(model)
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    kept = [node for node in bare.graph.node if node.op_type not in _PAIR]
    for node in kept:
        node.input[:] = [graph.before_pair(name) for name in node.input]
    _keep(bare, kept)
    return bare


def with_integer_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a QDQ graph whose constants are stored as int8 before their DequantizeLinear, a quarter of the size."""
    graph = Graph(model)
    stored = onnx.ModelProto()
    stored.CopyFrom(model)
    constants = {tensor.name: tensor for tensor in stored.graph.initializer}
    quantised = [node for node in graph.nodes if node.op_type == "QuantizeLinear" and node.input[0] in constants]
    for node in quantised:
        weights, scale = (graph.array(name) for name in node.input[:2])
        steps = np.rint(weights / scale.reshape(-1, *[1] * (weights.ndim - 1)))
        constants[node.input[0]].CopyFrom(
            numpy_helper.from_array(np.clip(steps, -128, 127).astype(np.int8), node.input[0])
        )
    sources = {node.output[0]: node.input[0] for node in quantised}
    kept = [node for node in stored.graph.node if node.output[0] not in sources]
    for node in kept:
        node.input[:] = [sources.get(name, name) for name in node.input]
    _keep(stored, kept)
    return stored


def _keep(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> None:
    """Drop all other nodes, and the constants that nothing reads any more."""
    read = {name for node in nodes for name in node.input}
    constants = [tensor for tensor in model.graph.initializer if tensor.name in read]
    # Copied before the originals go.
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    constants = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in constants]
    del model.graph.node[:]
    del model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(constants)
