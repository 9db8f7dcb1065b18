"""What TensorRT asks of an explicitly quantised (QDQ) graph, and which rules a graph breaks.

    edgefg check model.onnx --for tensorrt

The rules come from TensorRT's documentation of explicit quantisation and from what its users report. Nothing here needs
a GPU or torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import onnx

from edgefg.export.graph import Graph

INPUT = "images"
"""Name of our graphs' uint8 input."""
_ACTIVATIONS = ("Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSigmoid", "HardSwish", "Softmax", "Tanh")
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_UNPAIRED = ("Relu", "Sigmoid", "Softmax", "Concat", "Reshape")
_OPSETS = range(13, 21)


class Rule(NamedTuple):
    """One thing that TensorRT asks for."""

    asks: str
    fix: str
    refused: bool
    """True where TensorRT refuses a graph that breaks it, False where that only runs slower or less exactly."""


RULES = {
    "opset": Rule("opset 13 to 20", "export again with edgefg, which writes opset 18", True),
    "uint8-cast": Rule("a uint8 input to feed one Cast and nothing else", "cast first, then transpose", True),
    "symmetric-int8": Rule("int8 and zero points of zero", "quantise with QInt8 and ActivationSymmetric", True),
    "positive-scale": Rule("constant scales above zero", "calibrate again with other images", True),
    "per-tensor": Rule("one scale for an activation", "quantise constants alone per channel", True),
    "pair": Rule("Q to feed DQ alone, with the same scale", "put both halves on the tensor", True),
    "weight-axis": Rule(
        "axis 0, of ConvTranspose and untransposed matrices 1", "quantise along the output channels", True
    ),
    "float-bias": Rule("a bias in floating point", "turn QuantizeBias off", True),
    "pad-conv": Rule("no pair between Pad and a convolution", "leave that convolution in floating point", True),
    "weights-and-data": Rule("both quantised, or neither", "quantise both inputs of the layer", False),
    "conv-activation": Rule("none, so that the two fuse", "move the pair behind the activation", False),
    "gemm-output": Rule("none there", "exclude the output of Gemm from quantisation", False),
    "normalisation": Rule("none before the first layer", "exclude the nodes of the normalisation", False),
    "shared-pair": Rule("one pair for a tensor", "let all its readers take the same DQ", False),
    "own-pair": Rule("none for it", "quantise the inputs of Conv, Gemm and MatMul only", False),
    "residual-skip": Rule("a pair on the skip, so that Conv and Add fuse", "quantise the skip", False),
    "residual-branch": Rule("none on the branch that ends in a convolution", "leave that branch's pair out", False),
}
"""Every rule, by name."""


class Broken(NamedTuple):
    """One place where a graph breaks a rule."""

    rule: str
    """A name in `RULES`."""
    node: str
    found: str

    @property
    def refused(self) -> bool:
        """Whether TensorRT would refuse the graph for this."""
        return RULES[self.rule].refused

    def render(self) -> str:
        """Return it as one line: node, rule, what was found, what is asked for, the fix."""
        rule = RULES[self.rule]
        kind = "refused" if rule.refused else "slower"
        return f"{self.node}: {self.rule} ({kind}): {self.found}; needed {rule.asks}: {rule.fix}"


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
    found = [] if opset in _OPSETS else [Broken("opset", "graph", f"opset {opset}")]
    found += _input_rule(graph, model)
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


def _input_rule(graph: Graph, model: onnx.ModelProto) -> Iterator[Broken]:
    for value in model.graph.input:
        if value.name in graph.constants or value.type.tensor_type.elem_type != onnx.TensorProto.UINT8:
            continue
        readers = [node.op_type for node in graph.readers(value.name)]
        if readers != ["Cast"]:
            yield Broken("uint8-cast", value.name, f"it feeds {', '.join(readers) or 'nothing'}")


def _pair_rules(graph: Graph, node: onnx.NodeProto) -> Iterator[Broken]:
    """Symmetric int8, positive scales, and never one half of a pair alone."""
    if len(node.input) < 3 or node.input[2] not in graph.constants:
        yield Broken("symmetric-int8", node.name, "no constant zero point, so uint8")
    else:
        zero_point = graph.constants[node.input[2]]
        kind = onnx.TensorProto.DataType.Name(zero_point.data_type)
        if kind != "INT8" or graph.array(node.input[2]).any():
            yield Broken("symmetric-int8", node.name, f"{kind} zero points, up to {graph.array(node.input[2]).max()}")
    if node.input[1] not in graph.constants:
        yield Broken("positive-scale", node.name, "a scale that is computed at run time")
        return
    scale = graph.array(node.input[1])
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        yield Broken("positive-scale", node.name, f"a scale of {scale.min():g}")
    if scale.size > 1 and not _is_constant(graph, node):
        yield Broken("per-tensor", node.name, f"{scale.size} scales on an activation")
    if node.op_type == "QuantizeLinear":
        readers = graph.readers(node.output[0])
        if {reader.op_type for reader in readers} != {"DequantizeLinear"}:
            yield Broken("pair", node.name, f"it feeds {', '.join(graph.reader_ops(node)) or 'nothing'}")
        elif any(reader.input[1] != node.input[1] and not _same(graph, reader, node) for reader in readers):
            yield Broken("pair", node.name, "Q and DQ have different scales")


def _same(graph: Graph, one: onnx.NodeProto, other: onnx.NodeProto) -> bool:
    return np.array_equal(graph.array(one.input[1]), graph.array(other.input[1]))


def _is_constant(graph: Graph, node: onnx.NodeProto) -> bool:
    """Tell whether a Q or DQ node works on a constant, directly or through its other half."""
    source = graph.writer(node.input[0])
    return node.input[0] in graph.constants or (source is not None and source.input[0] in graph.constants)


def _activation_rules(graph: Graph, node: onnx.NodeProto) -> Iterator[Broken]:
    """Where a pair on an activation may not stand."""
    source = graph.writer_op(node.input[0])
    behind = {op for reader in graph.readers(node.output[0]) for op in graph.reader_ops(reader)}
    if source in _WEIGHTED and behind & set(_ACTIVATIONS):
        yield Broken("conv-activation", node.name, f"a pair between {source} and {', '.join(behind)}")
    elif behind and behind <= set(_UNPAIRED):
        yield Broken("own-pair", node.name, f"a pair for {', '.join(sorted(behind))} alone")
    if source == "Gemm":
        yield Broken("gemm-output", node.name, "a pair on the output of Gemm")
    if source == "Pad" and behind & set(_WEIGHTED):
        yield Broken("pad-conv", node.name, "a pair between Pad and a convolution")
    if source in ("Cast", "Transpose", "") or behind & {"Sub", "Div", "Transpose", "Cast"}:
        yield Broken("normalisation", node.name, f"a pair between {source or 'the input'} and {', '.join(behind)}")
    if len([reader for reader in graph.readers(node.input[0]) if reader.op_type == "QuantizeLinear"]) > 1:
        yield Broken("shared-pair", node.name, f"one of several pairs on {node.input[0]}")


def _weighted_rules(graph: Graph, node: onnx.NodeProto) -> Iterator[Broken]:
    """Weights and data both dequantised, or neither; weights by output channel; bias in floating point."""
    halves = [graph.writer_op(name) == "DequantizeLinear" for name in node.input[:2]]
    if halves[0] != halves[1]:
        yield Broken("weights-and-data", node.name, f"only the {'data' if halves[0] else 'weights'} are quantised")
    if len(node.input) > 2 and graph.writer_op(node.input[2]) == "DequantizeLinear":
        yield Broken("float-bias", node.name, "a quantised bias")
    weights = graph.writer(node.input[1])
    if weights is None or weights.op_type != "DequantizeLinear" or weights.input[1] not in graph.constants:
        return
    axis = next((attribute.i for attribute in weights.attribute if attribute.name == "axis"), 1)
    first = node.op_type == "Conv" or (node.op_type == "Gemm" and _transposed(node))
    if graph.array(weights.input[1]).size > 1 and axis != (0 if first else 1):
        yield Broken("weight-axis", node.name, f"weights quantised along axis {axis}")


def _transposed(gemm: onnx.NodeProto) -> bool:
    return any(attribute.name == "transB" and attribute.i for attribute in gemm.attribute)


def _residual_rules(graph: Graph, node: onnx.NodeProto) -> Iterator[Broken]:
    """A residual Add takes one branch straight from a convolution and the other one through a pair."""
    sources = [graph.writer_op(name) for name in node.input]
    plain = sources.count("Conv")
    if plain == 2:
        yield Broken("residual-skip", node.name, "both branches come straight from a convolution")
    elif plain == 1 and "DequantizeLinear" not in sources and not set(node.input) & set(graph.constants):
        yield Broken("residual-skip", node.name, "no pair on the skip")
    elif plain == 0 and sources.count("DequantizeLinear") == 2:
        yield Broken("residual-branch", node.name, "pairs on both branches")
