"""Nodes that stay in FP32 when the rest of a graph is cast to FP16."""

from __future__ import annotations

import numpy as np
import onnx

from edgefg.export.onnx.graph import Graph

_LEAST_NORMAL = float(np.finfo(np.float16).smallest_normal)
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
# Operators that overflow, underflow or have a steep slope near zero; `_is_steep` adds quotients by a computed number
# and products of two computed matrices.
_STEEP = (
    "Exp", "GroupNormalization", "InstanceNormalization", "LayerNormalization", "Log", "LogSoftmax", "LpNormalization",
    "Pow", "Reciprocal", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceSum", "ReduceSumSquare",
    "Sqrt",
)  # fmt: skip
# Sums over many values, divided by their number.
_MEANS = ("GlobalAveragePool", "ReduceMean", "Softmax")
# Cheap operators: between two nodes in FP32 they cost less in FP32 than two casts.
_LIGHT = (
    "Abs", "Add", "Clip", "Concat", "Div", "Flatten", "Identity", "Mul", "Neg", "Relu", "Reshape", "Sign", "Squeeze",
    "Sub", "Transpose", "Unsqueeze",
)  # fmt: skip
# Their biases are added to sums that FP16 holds.
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Scales have rules of their own, and those of Resize are FP32 by definition.
_SCALED = ("QuantizeLinear", "DequantizeLinear", "Resize")


def fp16_blocklist(graph: Graph, *, means: bool) -> set[str]:
    """Return the first output of every node that is to stay in FP32, in an FP32 graph or one that is cast already.

    These are the steep operators, those that read a constant below FP16's normal numbers (an ε, which the cast would
    blur or drop), and light operators between them. A mean that only they read is one of them.

    Args:
        graph: floating point, or QDQ.
        means: whether every mean (so every pooling) and softmax is one. If not, a plain convolutional network has no
            such node.
    """
    wanted = {*_STEEP, *_MEANS} if means else {*_STEEP}
    certain = {
        node.output[0]
        for node in graph.nodes
        if node.op_type in wanted or _is_steep(graph, node) or _reads_tiny_constant(graph, node)
    }
    light = {node.output[0] for node in graph.nodes if node.op_type in (*_LIGHT, *_MEANS)} - certain
    while lost := {name for name in light if not _is_between(graph, name, certain | light)}:
        light -= lost
    return certain | light


def fp32_tensors(graph: Graph, kept: set[str]) -> set[str]:
    """Return the tensors that only nodes in FP32 (of `fp16_blocklist`) write and read."""
    return {name for name in kept - graph.outputs if all(reader.output[0] in kept for reader in graph.readers(name))}


def _is_steep(graph: Graph, node: onnx.NodeProto) -> bool:
    if node.op_type == "Div":
        return node.input[1] not in graph.constants
    # Sums of products of activations, as of bilinear pooling: squares of what the layers before held.
    return node.op_type == "MatMul" and all(
        name not in graph.constants and graph.writer_op(name) != "DequantizeLinear" for name in node.input
    )


def _reads_tiny_constant(graph: Graph, node: onnx.NodeProto) -> bool:
    """Return whether a node reads a constant that is entirely below FP16's normal numbers.

    Small values beside larger ones do not matter. Weights below them are common in channels that training has switched
    off.
    """
    if node.op_type in _SCALED:
        return False
    names = node.input[:2] if node.op_type in _WEIGHTED else node.input
    return any(
        name in graph.constants
        and graph.constants[name].data_type in _FLOATS
        and 0 < float(np.abs(graph.array(name)).max(initial=0.0)) < _LEAST_NORMAL
        for name in names
    )


def _is_between(graph: Graph, name: str, found: set[str]) -> bool:
    node, readers = graph.writer(name), graph.readers(name)
    assert node is not None
    if name in graph.outputs or not readers or any(reader.output[0] not in found for reader in readers):
        return False
    writers = [writer for tensor in node.input if (writer := graph.writer(tensor)) is not None]
    return node.op_type in _MEANS or (bool(writers) and all(writer.output[0] in found for writer in writers))
