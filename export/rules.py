"""What TensorRT asks of an explicitly quantised (QDQ) graph, and which rules a graph breaks.

The rules come from TensorRT's documentation of explicit quantisation and from what its users report. Nothing here needs
a GPU or torch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

INPUT = "images"
"""Name of the graph's uint8 input."""
_ACTIVATIONS = ("Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSigmoid", "HardSwish", "Softmax", "Tanh")
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_OPSETS = range(13, 21)


class Broken(NamedTuple):
    """One place where a graph breaks a rule."""

    node: str
    what: str
    refused: bool
    """True where TensorRT refuses the graph, False where it only runs slower or less exactly than it could."""


class Graph:
    """Look-ups over an ONNX graph: who writes a tensor, who reads it, which are constants."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.outputs = {value.name for value in model.graph.output}
        self._writers = {name: node for node in self.nodes for name in node.output}
        self._readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                self._readers[name].append(node)

    def writer(self, tensor: str) -> onnx.NodeProto | None:
        """Return the node that writes a tensor; None for constants and inputs."""
        return self._writers.get(tensor)

    def readers(self, tensor: str) -> list[onnx.NodeProto]:
        """Return the nodes that read a tensor."""
        return self._readers[tensor]

    def writer_op(self, tensor: str) -> str:
        """Return the op type of the node that writes a tensor; empty for constants and inputs."""
        node = self.writer(tensor)
        return node.op_type if node is not None else ""

    def reader_ops(self, node: onnx.NodeProto) -> list[str]:
        """Return the op types that read a node's first output."""
        return [reader.op_type for reader in self.readers(node.output[0])]

    def array(self, tensor: str) -> npt.NDArray[Any]:
        """Return a constant's values."""
        return numpy_helper.to_array(self.constants[tensor])


def skip_tensors(model: onnx.ModelProto) -> list[str]:
    """Name, for every residual Add, the tensor that its skip hands over.

    The Add fuses into the convolution that ends the other branch, which wants the skip in 8 bits. Where both branches
    end in one, the skip is the branch with fewer nodes between it and the network's input.
    """
    graph = Graph(model)
    depth: dict[str, int] = {}
    skips = []
    for node in graph.nodes:
        deepest = 1 + max((depth.get(name, 0) for name in node.input), default=0)
        depth.update(dict.fromkeys(node.output, deepest))
        if node.op_type != "Add" or set(node.input) & set(graph.constants):
            continue
        convolutions = [name for name in node.input if graph.writer_op(name) == "Conv"]
        if len(convolutions) == 2:
            skips.append(min(node.input, key=lambda name: depth[name]))
        elif len(convolutions) == 1:
            skips += [name for name in node.input if name not in convolutions]
    return skips


def broken_rules(model: onnx.ModelProto) -> list[Broken]:
    """Return one entry for each place where a QDQ graph breaks a rule; none where TensorRT can take all of it."""
    graph = Graph(model)
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    found = [] if opset in _OPSETS else [Broken("graph", f"opset {opset}; needed 13 to 20", True)]
    found += _input_rule(graph)
    for node in graph.nodes:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            found += _pair_rules(graph, node)
        if node.op_type == "QuantizeLinear" and node.input[0] not in graph.constants:
            found += _activation_rules(graph, node)
        elif node.op_type in _WEIGHTED:
            found += _weighted_rules(graph, node)
        elif node.op_type == "Add":
            found += _residual_rules(graph, node)
    return found


def _input_rule(graph: Graph) -> Iterator[Broken]:
    readers = [node.op_type for node in graph.readers(INPUT)]
    if readers != ["Cast"]:
        yield Broken(INPUT, f"the uint8 input feeds {readers}; needed one Cast", True)


def _pair_rules(graph: Graph, node: onnx.NodeProto) -> Iterator[Broken]:
    """Symmetric int8, positive scales, and never one half of a pair alone."""
    if len(node.input) > 2:
        zero_point = graph.constants[node.input[2]]
        if zero_point.data_type != onnx.TensorProto.INT8 or graph.array(node.input[2]).any():
            kind = onnx.TensorProto.DataType.Name(zero_point.data_type)
            yield Broken(node.name, f"{kind} zero points; needed int8 zeros", True)
    else:
        yield Broken(node.name, "no zero point, so uint8; needed an int8 one", True)
    scale = graph.array(node.input[1])
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        yield Broken(node.name, "a scale is not positive", True)
    if scale.size > 1 and not _is_constant(graph, node):
        yield Broken(node.name, f"{scale.size} scales on an activation; needed one for the tensor", True)
    if node.op_type == "QuantizeLinear" and set(graph.reader_ops(node)) != {"DequantizeLinear"}:
        yield Broken(node.name, "not followed by DequantizeLinear alone", True)


def _is_constant(graph: Graph, node: onnx.NodeProto) -> bool:
    """Tell whether a Q or DQ node works on a constant, directly or through its other half."""
    source = graph.writer(node.input[0])
    return node.input[0] in graph.constants or (source is not None and source.input[0] in graph.constants)


def _activation_rules(graph: Graph, node: onnx.NodeProto) -> Iterator[Broken]:
    """Where a pair on an activation may not stand."""
    source = graph.writer_op(node.input[0])
    behind = {op for reader in graph.readers(node.output[0]) for op in graph.reader_ops(reader)}
    if source in _WEIGHTED and behind & set(_ACTIVATIONS):
        yield Broken(node.name, f"between {source} and its activation; needed none, so that they fuse", False)
    if source == "Gemm":
        yield Broken(node.name, "on the output of Gemm", False)
    if source == "Pad" and behind & set(_WEIGHTED):
        yield Broken(node.name, "between Pad and a convolution", True)
    if source in ("Cast", "Transpose", "") or behind & {"Sub", "Div", "Transpose", "Cast"}:
        yield Broken(node.name, "inside the normalisation", False)
    if len([reader for reader in graph.readers(node.input[0]) if reader.op_type == "QuantizeLinear"]) > 1:
        yield Broken(node.name, f"a second pair on {node.input[0]}; needed one that is shared", False)


def _weighted_rules(graph: Graph, node: onnx.NodeProto) -> Iterator[Broken]:
    """Weights and data both dequantised, or neither; weights by output channel; bias in floating point."""
    halves = [graph.writer_op(name) == "DequantizeLinear" for name in node.input[:2]]
    if halves[0] != halves[1]:
        yield Broken(node.name, "only one of data and weights is quantised", False)
    if len(node.input) > 2 and graph.writer_op(node.input[2]) == "DequantizeLinear":
        yield Broken(node.name, "a quantised bias; needed floating point", True)
    weights = graph.writer(node.input[1])
    if weights is None or weights.op_type != "DequantizeLinear" or node.op_type == "MatMul":
        return
    axis = next((attribute.i for attribute in weights.attribute if attribute.name == "axis"), 1)
    wanted = 1 if node.op_type == "ConvTranspose" or (node.op_type == "Gemm" and not _transposed(node)) else 0
    if graph.array(weights.input[1]).size > 1 and axis != wanted:
        yield Broken(node.name, f"weights quantised along axis {axis}; needed {wanted}, the output channels", True)


def _transposed(gemm: onnx.NodeProto) -> bool:
    return any(attribute.name == "transB" and attribute.i for attribute in gemm.attribute)


def _residual_rules(graph: Graph, node: onnx.NodeProto) -> Iterator[Broken]:
    """A residual Add takes one branch straight from a convolution and the other one through a pair."""
    sources = [graph.writer_op(name) for name in node.input]
    plain = sources.count("Conv")
    if plain == 2:
        yield Broken(node.name, "adds two convolutions without a pair on the skip", False)
    elif plain == 1 and "DequantizeLinear" not in sources and not set(node.input) & set(graph.constants):
        yield Broken(node.name, "no pair on the skip", False)
    elif plain == 0 and sources.count("DequantizeLinear") == 2:
        yield Broken(node.name, "pairs on both branches; needed none on the one that ends in a convolution", False)
