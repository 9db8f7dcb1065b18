"""TensorRT's rules for explicitly quantised (QDQ) graphs.

    edgefg check model.onnx --for tensorrt

The rules come from TensorRT's documentation of explicit quantisation and from reports of its users. Nothing here needs
a GPU or torch.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import NamedTuple

import numpy as np
import onnx

from edgefg.export.onnx.fp16_blocklist import fp16_blocklist
from edgefg.export.onnx.graph import Graph, bound_types, name_of

INPUT = "images"
"""Name of our graphs' uint8 input."""
FULL_PRECISION = "edgefg.float32"
"""Metadata key of an ONNX file that says why its floating-point part is FP32."""
_ACTIVATIONS = ("Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSigmoid", "HardSwish", "Softmax", "Tanh")
_CONVOLUTIONS = ("Conv", "ConvTranspose")
_WEIGHTED = (*_CONVOLUTIONS, "Gemm", "MatMul")
_UNPAIRED = {"Relu", "Sigmoid", "Softmax", "Concat", "Reshape"}
_NORMALISING = ("Cast", "Transpose", "Sub", "Div", "Mul", "Add")
# Operators that compute in integers, ONNX's own and ONNX Runtime's; TensorRT's parser has none of them.
_INTEGER = re.compile(r"DynamicQuantize\w+|(Conv|MatMul)Integer\w*|QLinear\w+|QGemm|QAttention|QEmbed\w+|MatMulNBits")
_OPSETS = range(13, 21)
_HALF_OPSET = 19
_LEAST_NORMAL = float(np.finfo(np.float16).smallest_normal)


class Rule(NamedTuple):
    """A rule of TensorRT."""

    asks: str
    fix: str
    refused: bool
    """Whether TensorRT refuses a graph that breaks it; otherwise the graph runs slower or less exactly."""


RULES = {
    "opset": Rule("opset 13 to 20, with FP16 scales 19 or 20", "export again with edgefg", True),
    "explicit-qdq": Rule(
        "QuantizeLinear and DequantizeLinear around floating-point layers",
        "quantise with edgefg export, or statically in the QDQ format",
        True,
    ),
    "one-type": Rule("inputs of one type, which ONNX demands", "cast the layer with its scales, or leave both", True),
    "uint8-cast": Rule("a uint8 input to feed one Cast and nothing else", "cast first, then transpose", True),
    "symmetric-int8": Rule("int8 and zero points of zero", "quantise with QInt8 and ActivationSymmetric", True),
    "positive-scale": Rule("constant scales above zero", "calibrate again with other images", True),
    "per-tensor": Rule("one scale for an activation", "quantise only constants per channel", True),
    "pair": Rule("Q to feed only DQ, with the same scale and axis", "put both halves on the tensor", True),
    "weight-source": Rule(
        "a constant, through Q and DQ or as int8 through DQ", "fold what lies between into the constant", True
    ),
    "weight-axis": Rule(
        "axis 0, of ConvTranspose and untransposed matrices 1", "quantise along the output channels", True
    ),
    "scale-size": Rule("one scale for each channel", "quantise the weights again", True),
    "float-bias": Rule("a bias in floating point", "turn QuantizeBias off", True),
    "pad-conv": Rule("no pair between Pad and a convolution", "leave that convolution in floating point", True),
    "weights-and-data": Rule("both quantised, or neither", "quantise both inputs of the layer", False),
    "conv-activation": Rule("none, so that the two fuse", "move the pair behind the activation", False),
    "gemm-output": Rule("none there", "exclude the output of Gemm from quantisation", False),
    "normalisation": Rule("none before the first layer's input", "exclude the nodes of the normalisation", False),
    "shared-pair": Rule("one pair for a tensor", "let all its readers take the same DQ", False),
    "own-pair": Rule("none for it", "quantise the inputs of Conv, Gemm and MatMul only", False),
    "residual-skip": Rule("a pair on the skip, so that Conv and Add fuse", "quantise the skip", False),
    "residual-branch": Rule("none on the branch that ends in a convolution", "leave that branch's pair out", False),
    "half-precision": Rule(
        "FP16 with FP16 scales for what stays floating point, steep operators aside, or the reason why not in the file",
        "quantise with edgefg export, which casts it or says why not",
        False,
    ),
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
        """Return it as one line: node, rule, what was found, what is expected, the fix."""
        rule = RULES[self.rule]
        kind = "refused" if rule.refused else "slower"
        return f"{self.node}: {self.rule} ({kind}): {self.found}; expected {rule.asks}: {rule.fix}"


def full_precision_reason(model: onnx.ModelProto) -> str:
    """Return in one line why the floating-point part is FP32, as its quantiser stated; empty if it did not."""
    stated = next((entry.value for entry in model.metadata_props if entry.key == FULL_PRECISION), "")
    return " ".join(stated.split())


def skip_tensors(model: onnx.ModelProto, keep: Collection[str] = ()) -> list[str]:
    """Return, for every residual Add, the tensor of its skip connection.

    The Add fuses into the convolution that ends the other branch, which needs the skip in 8 bits. If both branches end
    in a convolution, the skip is the branch with fewer nodes between it and the network's input. Convolutions named in
    ``keep`` stay in floating point and do not fuse.
    """
    graph = Graph(model)
    depth: dict[str, int] = {}
    skips = []
    for node in graph.nodes:
        deepest = 1 + max((depth.get(name, 0) for name in node.input), default=0)
        depth.update(dict.fromkeys(node.output, deepest))
        if node.op_type != "Add" or set(node.input) & set(graph.constants):
            continue
        convolutions = [
            name
            for name in node.input
            if (writer := graph.writer(name)) is not None and writer.op_type == "Conv" and writer.name not in keep
        ]
        if len(convolutions) == 2:
            skips.append(min(node.input, key=lambda name: depth[name]))
        elif len(convolutions) == 1:
            skips += [name for name in node.input if name not in convolutions]
    return skips


def broken_rules(model: onnx.ModelProto) -> list[Broken]:
    """Return one entry for each place where a QDQ graph breaks a rule; empty if TensorRT can take the graph.

    Of nodes that compute in FP32, in integers or on mixed types, only the first is named, with their number.
    """
    graph = Graph(model)
    layers = [node for node in graph.nodes if node.op_type in _WEIGHTED]
    biases = {name for node in layers for name in node.input[2:]}
    second = {node.input[1] for node in layers}
    weights = {node.input[1] for node in layers if node.op_type != "MatMul"}
    normalising = _normalising(graph)
    found = [*_opset_rule(graph), *_integer_rule(graph), *_input_rule(graph), *_type_rule(graph)]
    if all(broken.rule != "one-type" for broken in found):  # the type of such a node is undefined
        found += _half_rule(graph, stated=bool(full_precision_reason(model)))
    for node in graph.nodes:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.output[0] not in biases:
            found += _number_rules(graph, node, may_have_axis=node.output[0] in weights)
        if node.op_type == "DequantizeLinear" and node.output[0] not in biases | second:
            found += _size_rule(graph, node)
        if node.op_type == "QuantizeLinear":
            found += _pair_rule(graph, node)
            if node.input[0] not in graph.constants:
                found += _activation_rules(graph, node, normalising)
        elif node.op_type in _WEIGHTED:
            found += _weighted_rules(graph, node)
        elif node.op_type == "Add":
            found += _residual_rules(graph, node)
    return found


def _opset_rule(graph: Graph) -> Iterator[Broken]:
    if graph.opset not in _OPSETS:
        yield Broken("opset", "graph", f"opset {graph.opset}")
    elif graph.opset < _HALF_OPSET and any(_scale_kind(graph, node) == "FLOAT16" for node in graph.nodes):
        yield Broken("opset", "graph", f"opset {graph.opset} and FP16 scales")


def _integer_rule(graph: Graph) -> Iterator[Broken]:
    nodes = [node for node in graph.nodes if _INTEGER.fullmatch(node.op_type)]
    if nodes:
        kinds = ", ".join(sorted({node.op_type for node in nodes}))
        yield Broken("explicit-qdq", name_of(nodes[0]), f"{len(nodes)} nodes that compute in integers: {kinds}")


def _type_rule(graph: Graph) -> Iterator[Broken]:
    mixed = [(name_of(node), kinds) for node, bound in bound_types(graph) for kinds in bound.values() if len(kinds) > 1]
    if mixed:
        names = " and ".join(sorted(onnx.TensorProto.DataType.Name(kind) for kind in mixed[0][1]))
        others = f", and {len(mixed) - 1} such nodes more" if len(mixed) > 1 else ""
        yield Broken("one-type", mixed[0][0], f"inputs of {names}{others}")


def _input_rule(graph: Graph) -> Iterator[Broken]:
    for name, value in graph.inputs.items():
        readers = [node.op_type for node in graph.readers(name)]
        if value.type.tensor_type.elem_type == onnx.TensorProto.UINT8 and readers != ["Cast"]:
            yield Broken("uint8-cast", name, f"it feeds {', '.join(readers) or 'nothing'}")


def _scale_kind(graph: Graph, node: onnx.NodeProto) -> str:
    """Return the element type of a Q's or DQ's constant scale, empty for other nodes."""
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or node.input[1] not in graph.constants:
        return ""
    return str(onnx.TensorProto.DataType.Name(graph.constants[node.input[1]].data_type))


def _half_rule(graph: Graph, *, stated: bool) -> Iterator[Broken]:
    """FP16, unless the graph states why it is FP32, and scales that FP16 can hold."""
    if all(node.op_type != "QuantizeLinear" for node in graph.nodes):
        return
    found = [(name_of(node), what) for node in graph.nodes if (what := _few_digits(graph, node))]
    if not stated:
        kept = fp16_blocklist(graph, means=False)
        others = [node for node in graph.nodes if node.output[0] not in kept and not _feeds_only(graph, node, kept)]
        found += [(name_of(node), what) for node in others if (what := _in_full_precision(graph, node))]
    if found:
        more = f", and {len(found) - 1} nodes more in FP32" if len(found) > 1 else ""
        yield Broken("half-precision", found[0][0], f"{found[0][1]}{more}")


def _feeds_only(graph: Graph, node: onnx.NodeProto, kept: Collection[str]) -> bool:
    """Return whether a node is a Cast for nodes that stay in FP32."""
    readers = graph.readers(node.output[0])
    return node.op_type == "Cast" and bool(readers) and all(reader.output[0] in kept for reader in readers)


def _few_digits(graph: Graph, node: onnx.NodeProto) -> str:
    """Describe an FP16 scale below FP16's normal numbers; empty if there is none."""
    if _scale_kind(graph, node) != "FLOAT16" or not 0 < graph.array(node.input[1]).min() < _LEAST_NORMAL:
        return ""
    return f"an FP16 scale of {graph.array(node.input[1]).min():g}, below 2^-14, where FP16 loses digits"


def _in_full_precision(graph: Graph, node: onnx.NodeProto) -> str:
    """Describe what makes a node compute in FP32; empty if it does not.

    FP32 can only come from a constant, a Cast or a float input.
    """
    single = onnx.TensorProto.FLOAT
    if node.op_type == "Cast":
        to = next(attribute.i for attribute in node.attribute if attribute.name == "to")
        is_output = node.output[0] in graph.outputs and not graph.readers(node.output[0])
        return "a Cast to FP32" if to == single and not is_output else ""
    if _scale_kind(graph, node) == "FLOAT":
        return "an FP32 scale"
    for name in node.input[:1] if node.op_type == "Resize" else node.input:  # its scales are FP32 by definition
        if name in graph.constants and graph.constants[name].data_type == single:
            return f"the FP32 constant {name}"
        if name in graph.inputs and graph.inputs[name].type.tensor_type.elem_type == single:
            return f"the FP32 input {name}"
    return ""


def _number_rules(graph: Graph, node: onnx.NodeProto, *, may_have_axis: bool) -> Iterator[Broken]:
    """Symmetric int8 and positive scales, one for an activation."""
    yield from _zero_point_rule(graph, node)
    if node.input[1] not in graph.constants:
        yield Broken("positive-scale", name_of(node), "a scale that is computed at run time")
        return
    scale = graph.array(node.input[1])
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        yield Broken("positive-scale", name_of(node), f"a scale of {scale.min():g}")
    if scale.size > 1 and not may_have_axis and graph.before_pair(node.output[0]) not in graph.constants:
        yield Broken("per-tensor", name_of(node), f"{scale.size} scales on an activation")


def _zero_point_rule(graph: Graph, node: onnx.NodeProto) -> Iterator[Broken]:
    if len(node.input) > 2 and node.input[2] not in graph.constants:
        yield Broken("symmetric-int8", name_of(node), "zero points that are computed at run time")
    elif len(node.input) > 2:
        kind = onnx.TensorProto.DataType.Name(graph.constants[node.input[2]].data_type)
        values = graph.array(node.input[2])
        if kind != "INT8" or values.any():
            yield Broken("symmetric-int8", name_of(node), f"{kind} zero points, up to {values.max()}")
    elif node.op_type == "QuantizeLinear":
        yield Broken("symmetric-int8", name_of(node), "no zero point, so uint8")
    elif node.input[0] in graph.constants:
        kind = onnx.TensorProto.DataType.Name(graph.constants[node.input[0]].data_type)
        if kind != "INT8":
            yield Broken("symmetric-int8", name_of(node), f"{kind} values")


def _pair_rule(graph: Graph, node: onnx.NodeProto) -> Iterator[Broken]:
    """Q and DQ only in pairs."""
    readers = graph.readers(node.output[0])
    if {reader.op_type for reader in readers} != {"DequantizeLinear"}:
        yield Broken("pair", name_of(node), f"it feeds {', '.join(graph.reader_ops(node)) or 'nothing'}")
    elif any(reader.input[1] != node.input[1] and not _same_scale(graph, reader, node) for reader in readers):
        yield Broken("pair", name_of(node), "Q and DQ have different scales")
    elif _is_per_channel(graph, node) and any(_axis(graph, reader) != _axis(graph, node) for reader in readers):
        yield Broken("pair", name_of(node), "Q and DQ have different axes")


def _same_scale(graph: Graph, one: onnx.NodeProto, other: onnx.NodeProto) -> bool:
    if not {one.input[1], other.input[1]} <= set(graph.constants):
        return False
    return np.array_equal(graph.array(one.input[1]), graph.array(other.input[1]))


def _is_per_channel(graph: Graph, node: onnx.NodeProto) -> bool:
    return node.input[1] in graph.constants and graph.array(node.input[1]).size > 1


def _axis(graph: Graph, node: onnx.NodeProto) -> int:
    """Return the axis of a Q or DQ, counted from the front if the constant that it scales is known."""
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
    source = graph.before_pair(node.output[0])
    return axis + len(graph.constants[source].dims) if axis < 0 and source in graph.constants else axis


def _size_rule(graph: Graph, node: onnx.NodeProto) -> Iterator[Broken]:
    """As many scales as a constant has channels."""
    source = graph.before_pair(node.output[0])
    if source not in graph.constants or not _is_per_channel(graph, node):
        return
    dims, axis, shape = graph.constants[source].dims, _axis(graph, node), graph.array(node.input[1]).shape
    if not 0 <= axis < len(dims) or shape != (dims[axis],):
        sizes = "x".join(map(str, dims))
        yield Broken("scale-size", name_of(node), f"scales of shape {list(shape)} along axis {axis} of {sizes}")


def _normalising(graph: Graph) -> set[str]:
    """Return the tensors of the normalisation: the input and all that is computed from it and constants."""
    names = set(graph.inputs)
    for node in graph.nodes:
        data = [name for name in node.input if name not in graph.constants]
        if node.op_type in _NORMALISING and len(data) == 1 and data[0] in names:
            names.update(node.output)
    return names


def _activation_rules(graph: Graph, node: onnx.NodeProto, normalising: set[str]) -> Iterator[Broken]:
    """Places where an activation must not have a pair."""
    source = graph.writer_op(node.input[0])
    behind = {op for reader in graph.readers(node.output[0]) for op in graph.reader_ops(reader)}
    if source in _WEIGHTED and behind & set(_ACTIVATIONS):
        yield Broken("conv-activation", name_of(node), f"a pair between {source} and {', '.join(sorted(behind))}")
    elif behind & _UNPAIRED and not behind & {*_WEIGHTED, "Add"}:
        yield Broken("own-pair", name_of(node), f"a pair only for {', '.join(sorted(behind & _UNPAIRED))}")
    if source == "Gemm":
        yield Broken("gemm-output", name_of(node), "a pair on the output of Gemm")
    if source == "Pad" and behind & set(_CONVOLUTIONS):
        yield Broken("pad-conv", name_of(node), "a pair between Pad and a convolution")
    if node.input[0] in normalising and behind and not behind & set(_WEIGHTED):
        yield Broken(
            "normalisation", name_of(node), f"a pair between {source or 'the input'} and {', '.join(sorted(behind))}"
        )
    if len([reader for reader in graph.readers(node.input[0]) if reader.op_type == "QuantizeLinear"]) > 1:
        yield Broken("shared-pair", name_of(node), f"one of several pairs on {node.input[0]}")


def _weighted_rules(graph: Graph, node: onnx.NodeProto) -> Iterator[Broken]:
    """Weights and data both dequantised, or neither; constant weights by output channel; bias in floating point."""
    halves = [graph.writer_op(name) == "DequantizeLinear" for name in node.input[:2]]
    if halves[0] != halves[1]:
        yield Broken("weights-and-data", name_of(node), f"only the {'data' if halves[0] else 'weights'} are quantised")
    if len(node.input) > 2 and graph.writer_op(node.input[2]) == "DequantizeLinear":
        yield Broken("float-bias", name_of(node), "a quantised bias")
    weights = graph.writer(node.input[1])
    if weights is None or not halves[1]:
        return
    source = graph.before_pair(node.input[1])
    if node.op_type != "MatMul" and source not in graph.constants:
        yield Broken("weight-source", name_of(node), f"weights out of {graph.writer_op(source) or 'a network input'}")
    if not _is_per_channel(graph, weights):
        return
    axis = _axis(graph, weights)
    first = node.op_type == "Conv" or (node.op_type == "Gemm" and _transposed(node))
    if axis != (0 if first else 1):
        yield Broken("weight-axis", name_of(node), f"weights quantised along axis {axis}")
    else:
        yield from _size_rule(graph, weights)


def _transposed(gemm: onnx.NodeProto) -> bool:
    return any(attribute.name == "transB" and attribute.i for attribute in gemm.attribute)


def _residual_rules(graph: Graph, node: onnx.NodeProto) -> Iterator[Broken]:
    """A residual Add takes one branch straight from a convolution and the other one through a pair."""
    if set(node.input) & set(graph.constants):
        return
    branches = [graph.before_pair(name) for name in node.input if _ends_a_branch(graph, name)]
    straight = set(branches) & set(node.input)
    paired = [name for name in node.input if graph.writer_op(name) == "DequantizeLinear"]
    if len(straight) == 2:
        yield Broken("residual-skip", name_of(node), "both branches come straight from a convolution")
    elif straight and not paired:
        yield Broken("residual-skip", name_of(node), "no pair on the skip")
    elif branches and not straight:
        found = "pairs on both branches" if len(paired) == 2 else "a pair on the branch, none on the skip"
        yield Broken("residual-branch", name_of(node), found)


def _ends_a_branch(graph: Graph, name: str) -> bool:
    """Return whether a tensor comes, directly or by a pair, from an 8-bit convolution that can fuse with its reader."""
    source = graph.before_pair(name)
    convolution = graph.writer(source)
    if convolution is None or convolution.op_type != "Conv":
        return False
    alone = len(graph.readers(source)) == len(graph.readers(name)) == 1
    return alone and graph.writer_op(convolution.input[0]) == "DequantizeLinear"
