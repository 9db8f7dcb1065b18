"""Our INT8 graph for TensorRT spoilt in one way each, with the rule that it then breaks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgefg.export.onnx.graph import Graph

Edit = Callable[[onnx.ModelProto], None]
_INTEGER = ("DynamicQuantizeLinear", "ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul", "QLinearAdd")


def first(model: onnx.ModelProto, op_type: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == op_type)


def replace(model: onnx.ModelProto, name: str, values: np.ndarray) -> None:
    """Set a constant, with its type too."""
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(values, name))


def pair_on(model: onnx.ModelProto, tensor: str) -> None:
    """Put a Q/DQ pair of its own on a tensor."""
    scale, zero = activation_pair(model).input[1:3]
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if name == tensor:
                node.input[i] = "new_dq"
    model.graph.node.append(helper.make_node("QuantizeLinear", [tensor, scale, zero], ["new_q"], "new_q"))
    model.graph.node.append(helper.make_node("DequantizeLinear", ["new_q", scale, zero], ["new_dq"], "new_dq"))
    for output in model.graph.output:
        output.name = "new_dq" if output.name == tensor else output.name


def activation_pair(model: onnx.ModelProto) -> onnx.NodeProto:
    constants = {tensor.name for tensor in model.graph.initializer}
    return next(n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] not in constants)


def zero_point(model: onnx.ModelProto) -> None:
    replace(model, activation_pair(model).input[2], np.array(3, np.int8))


def unsigned(model: onnx.ModelProto) -> None:
    replace(model, activation_pair(model).input[2], np.array(0, np.uint8))


def negative_scale(model: onnx.ModelProto) -> None:
    replace(model, activation_pair(model).input[1], np.array(-1, np.float16))


def between_conv_and_clip(model: onnx.ModelProto) -> None:
    pair_on(model, first(model, "Clip").input[0])


def on_gemm(model: onnx.ModelProto) -> None:
    pair_on(model, first(model, "Gemm").output[0])


def in_normalisation(model: onnx.ModelProto) -> None:
    pair_on(model, first(model, "Sub").output[0])


def both_branches(model: onnx.ModelProto) -> None:
    graph = Graph(model)
    pair_on(model, next(name for name in first(model, "Add").input if graph.writer_op(name) == "Conv"))


def plain_skip(model: onnx.ModelProto) -> None:
    graph, add = Graph(model), first(model, "Add")
    for i, name in enumerate(add.input):
        if graph.writer_op(name) == "DequantizeLinear":
            model.graph.node.append(helper.make_node("Identity", [name], ["plain"], "identity"))
            add.input[i] = "plain"


def unpaired_weights(model: onnx.ModelProto) -> None:
    graph, conv = Graph(model), first(model, "Conv")
    conv.input[1] = graph.writer(graph.writer(conv.input[1]).input[0]).input[0]


def set_axis(model: onnx.ModelProto, dq: onnx.NodeProto, axis: int) -> None:
    """Set it at both halves of a pair."""
    for node in (dq, Graph(model).writer(dq.input[0])):
        next(attribute for attribute in node.attribute if attribute.name == "axis").i = axis


def wrong_axis(model: onnx.ModelProto) -> None:
    dq = Graph(model).writer(first(model, "Gemm").input[1])
    assert dq is not None
    set_axis(model, dq, 1)


def two_axes(model: onnx.ModelProto) -> None:
    graph = Graph(model)
    quantize = graph.writer(graph.writer(first(model, "Gemm").input[1]).input[0])
    next(attribute for attribute in quantize.attribute if attribute.name == "axis").i = 1


def too_few_scales(model: onnx.ModelProto) -> None:
    scale = Graph(model).writer(first(model, "Conv").input[1]).input[1]
    replace(model, scale, Graph(model).array(scale)[:-1])


def too_many_scales_of_int8_weights(model: onnx.ModelProto) -> None:
    """Weights that are int8 already."""
    graph = Graph(model)
    dq = graph.writer(first(model, "Gemm").input[1])
    quantize = graph.writer(dq.input[0])
    replace(model, quantize.input[0], np.ones(graph.array(quantize.input[0]).shape, np.int8))
    dq.input[0] = quantize.input[0]
    model.graph.node.remove(quantize)
    replace(model, dq.input[1], np.full(graph.array(dq.input[1]).size + 1, 0.1, np.float16))


def scales_of_another_constant(model: onnx.ModelProto) -> None:
    """Of one that no layer multiplies with."""
    for name, values in (("c", np.ones((4, 3), np.int8)), ("c_s", np.full(4, 0.1, np.float16))):
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    model.graph.node.append(helper.make_node("DequantizeLinear", ["c", "c_s"], ["c_f"], "of a constant", axis=1))


def integer_layer(op_type: str) -> Edit:
    def add(model: onnx.ModelProto) -> None:
        data = dq_of(model, activation_pair(model))
        model.graph.node.append(helper.make_node(op_type, [data], ["sum"], "integer layer"))

    add.__name__ = op_type
    return add


def int32_bias(model: onnx.ModelProto) -> None:
    conv = next(node for node in model.graph.node if node.op_type == "Conv" and len(node.input) == 3)
    scale, zero = activation_pair(model).input[1:3]
    model.graph.node.append(helper.make_node("DequantizeLinear", ["bias_q", scale, zero], ["bias_dq"], "bias"))
    conv.input[2] = "bias_dq"


def quantiser_bias(model: onnx.ModelProto) -> None:
    """As ONNX Runtime's quantiser writes it where QuantizeBias stays on."""
    conv = next(node for node in model.graph.node if node.op_type == "Conv" and len(node.input) == 3)
    size = Graph(model).array(conv.input[2]).size
    for name, values in (("b_q", np.ones(size, np.int32)), ("b_s", np.full(size, 1e-3, np.float16))):
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    model.graph.node.append(helper.make_node("DequantizeLinear", ["b_q", "b_s"], ["b"], "bias", axis=0))
    conv.input[2] = "b"


def computed_weights(model: onnx.ModelProto) -> None:
    """An int8 constant that an Identity hands to the DQ."""
    graph = Graph(model)
    dq = graph.writer(first(model, "Conv").input[1])
    quantize = graph.writer(dq.input[0])
    weights = np.ones(graph.array(quantize.input[0]).shape, np.int8)
    model.graph.node.remove(quantize)
    model.graph.initializer.append(numpy_helper.from_array(weights, "w8"))
    model.graph.node.append(helper.make_node("Identity", ["w8"], ["computed"], "identity"))
    dq.input[0] = "computed"


def as_matmul(model: onnx.ModelProto) -> onnx.NodeProto:
    """Write the Gemm as a MatMul, its weights as [K, N]; return the weights' DQ."""
    graph, gemm = Graph(model), first(model, "Gemm")
    dq = graph.writer(gemm.input[1])
    quantize = graph.writer(dq.input[0])
    replace(model, quantize.input[0], np.ascontiguousarray(graph.array(quantize.input[0]).T))
    for node in (quantize, dq):
        next(attribute for attribute in node.attribute if attribute.name == "axis").i = 1
    gemm.op_type = "MatMul"
    del gemm.attribute[:], gemm.input[2:]
    assert dq is not None
    return dq


def wrong_axis_of_matmul(model: onnx.ModelProto) -> None:
    set_axis(model, as_matmul(model), 0)


def pair_moved_to_the_branch(model: onnx.ModelProto) -> None:
    graph, add = Graph(model), first(model, "Add")
    (branch,) = (name for name in add.input if graph.writer_op(name) == "Conv")
    (skip,) = set(add.input) - {branch}
    add.input[list(add.input).index(skip)] = graph.before_pair(skip)
    pair_on(model, branch)


def full_precision_scale(model: onnx.ModelProto) -> None:
    name = activation_pair(model).input[1]
    replace(model, name, Graph(model).array(name).astype(np.float32))


def subnormal_scale(model: onnx.ModelProto) -> None:
    replace(model, activation_pair(model).input[1], np.array(3e-6, np.float16))


def full_precision_pooling(model: onnx.ModelProto) -> None:
    pool = first(model, "ReduceMean")
    before = helper.make_node("Cast", [pool.input[0]], ["single"], "to single", to=TensorProto.FLOAT)
    after = helper.make_node("Cast", ["pooled"], [pool.output[0]], "to half", to=TensorProto.FLOAT16)
    pool.input[0], pool.output[0] = "single", "pooled"
    model.graph.node.extend([before, after])


def full_precision_bias(model: onnx.ModelProto) -> None:
    name = first(model, "Gemm").input[2]
    replace(model, name, Graph(model).array(name).astype(np.float32))


def early_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 18


def second_cast(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Cast", ["images"], ["other"], to=TensorProto.FLOAT16))


def late_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 21


def on_the_skip_again(model: onnx.ModelProto) -> None:
    """A second pair on a tensor that has one."""
    pair = activation_pair(model)
    scale, zero = pair.input[1:3]
    reader = next(node for node in model.graph.node if node.op_type == "Conv" and node.input[0] == dq_of(model, pair))
    model.graph.node.append(helper.make_node("QuantizeLinear", [pair.input[0], scale, zero], ["again_q"], "again_q"))
    model.graph.node.append(helper.make_node("DequantizeLinear", ["again_q", scale, zero], ["again"], "again_dq"))
    reader.input[0] = "again"


def dq_of(model: onnx.ModelProto, pair: onnx.NodeProto) -> str:
    return next(node.output[0] for node in model.graph.node if node.input and node.input[0] == pair.output[0])


def many_scales(model: onnx.ModelProto) -> None:
    replace(model, activation_pair(model).input[1], np.full(3, 0.1, np.float16))


def half_a_pair(model: onnx.ModelProto) -> None:
    pair = activation_pair(model)
    model.graph.node.append(helper.make_node("Identity", [pair.output[0]], ["eight bits"], "reads the Q itself"))


def two_scales(model: onnx.ModelProto) -> None:
    name = dq_of(model, activation_pair(model))
    node = next(node for node in model.graph.node if node.output[0] == name)
    model.graph.initializer.append(numpy_helper.from_array(np.array(0.5, np.float16), "another scale"))
    node.input[1] = "another scale"


def behind_pad(model: onnx.ModelProto) -> None:
    pair = activation_pair(model)
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(8, np.int64), "pads"))
    model.graph.node.append(helper.make_node("Pad", [pair.input[0], "pads"], ["padded"], "pad"))
    pair.input[0] = "padded"


def pair_for_relu(model: onnx.ModelProto) -> None:
    last = first(model, "ReduceMean")
    source = last.input[0]
    model.graph.node.append(helper.make_node("Relu", [source], ["again relu"], "again relu"))
    last.input[0] = "again relu"
    scale, zero = activation_pair(model).input[1:3]
    relu = model.graph.node[-1]
    model.graph.node.append(helper.make_node("QuantizeLinear", [source, scale, zero], ["own_q"], "own_q"))
    model.graph.node.append(helper.make_node("DequantizeLinear", ["own_q", scale, zero], ["own_dq"], "own_dq"))
    relu.input[0] = "own_dq"


SPOILT: list[tuple[Edit, str, bool]] = [
    (zero_point, "symmetric-int8", True),
    (unsigned, "symmetric-int8", True),
    (negative_scale, "positive-scale", True),
    (many_scales, "per-tensor", True),
    (half_a_pair, "pair", True),
    (two_scales, "pair", True),
    (two_axes, "pair", True),
    (between_conv_and_clip, "conv-activation", False),
    (on_gemm, "gemm-output", False),
    (in_normalisation, "normalisation", False),
    (both_branches, "residual-branch", False),
    (pair_moved_to_the_branch, "residual-branch", False),
    (plain_skip, "residual-skip", False),
    (unpaired_weights, "weights-and-data", False),
    (computed_weights, "weight-source", True),
    (wrong_axis, "weight-axis", True),
    (wrong_axis_of_matmul, "weight-axis", True),
    (too_few_scales, "scale-size", True),
    (too_many_scales_of_int8_weights, "scale-size", True),
    (scales_of_another_constant, "scale-size", True),
    *((integer_layer(op_type), "explicit-qdq", True) for op_type in _INTEGER),
    (int32_bias, "float-bias", True),
    (quantiser_bias, "float-bias", True),
    (second_cast, "uint8-cast", True),
    (late_opset, "opset", True),
    (early_opset, "opset", True),
    (on_the_skip_again, "shared-pair", False),
    (behind_pad, "pad-conv", True),
    (pair_for_relu, "own-pair", False),
    (full_precision_scale, "one-type", True),
    (full_precision_bias, "one-type", True),
    (subnormal_scale, "half-precision", False),
    (full_precision_pooling, "half-precision", False),
]
"""Each with whether TensorRT refuses the graph for it."""
