"""The rules of explicit quantisation: our graphs keep all, and a graph spoilt in one way breaks that rule alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch_pruning
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from edgefg.export.check import check
from edgefg.export.graph import Graph
from edgefg.export.quantize import quantize_tensorrt
from edgefg.export.rules import RULES, broken_rules
from edgefg.export.to_onnx import write_onnx
from edgefg.preprocess import InputSpec
from edgefg.training.methods import build
from edgefg.training.models.backbone import build_backbone, head_of

Edit = Callable[[onnx.ModelProto], None]


def _first(model: onnx.ModelProto, op_type: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == op_type)


def _replace(model: onnx.ModelProto, name: str, values: np.ndarray) -> None:
    """Set a constant, with its type too."""
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(values, name))


def _pair_on(model: onnx.ModelProto, tensor: str) -> None:
    """Put a Q/DQ pair of its own on a tensor."""
    scale, zero = _activation_pair(model).input[1:3]
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if name == tensor:
                node.input[i] = "new_dq"
    model.graph.node.append(helper.make_node("QuantizeLinear", [tensor, scale, zero], ["new_q"], "new_q"))
    model.graph.node.append(helper.make_node("DequantizeLinear", ["new_q", scale, zero], ["new_dq"], "new_dq"))
    for output in model.graph.output:
        output.name = "new_dq" if output.name == tensor else output.name


def _activation_pair(model: onnx.ModelProto) -> onnx.NodeProto:
    constants = {tensor.name for tensor in model.graph.initializer}
    return next(n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] not in constants)


def _zero_point(model: onnx.ModelProto) -> None:
    _replace(model, _activation_pair(model).input[2], np.array(3, np.int8))


def _unsigned(model: onnx.ModelProto) -> None:
    _replace(model, _activation_pair(model).input[2], np.array(0, np.uint8))


def _negative_scale(model: onnx.ModelProto) -> None:
    _replace(model, _activation_pair(model).input[1], np.array(-1, np.float16))


def _between_conv_and_clip(model: onnx.ModelProto) -> None:
    _pair_on(model, _first(model, "Clip").input[0])


def _on_gemm(model: onnx.ModelProto) -> None:
    _pair_on(model, _first(model, "Gemm").output[0])


def _in_normalisation(model: onnx.ModelProto) -> None:
    _pair_on(model, _first(model, "Sub").output[0])


def _both_branches(model: onnx.ModelProto) -> None:
    graph = Graph(model)
    _pair_on(model, next(name for name in _first(model, "Add").input if graph.writer_op(name) == "Conv"))


def _plain_skip(model: onnx.ModelProto) -> None:
    graph, add = Graph(model), _first(model, "Add")
    for i, name in enumerate(add.input):
        if graph.writer_op(name) == "DequantizeLinear":
            model.graph.node.append(helper.make_node("Identity", [name], ["plain"], "identity"))
            add.input[i] = "plain"


def _unpaired_weights(model: onnx.ModelProto) -> None:
    graph, conv = Graph(model), _first(model, "Conv")
    conv.input[1] = graph.writer(graph.writer(conv.input[1]).input[0]).input[0]


def _wrong_axis(model: onnx.ModelProto) -> None:
    graph = Graph(model)
    weights = graph.writer(_first(model, "Gemm").input[1])
    next(attribute for attribute in weights.attribute if attribute.name == "axis").i = 1


def _int32_bias(model: onnx.ModelProto) -> None:
    conv = next(node for node in model.graph.node if node.op_type == "Conv" and len(node.input) == 3)
    scale, zero = _activation_pair(model).input[1:3]
    model.graph.node.append(helper.make_node("DequantizeLinear", ["bias_q", scale, zero], ["bias_dq"], "bias"))
    conv.input[2] = "bias_dq"


def _quantiser_bias(model: onnx.ModelProto) -> None:
    """As ONNX Runtime's quantiser writes it where QuantizeBias stays on."""
    conv = next(node for node in model.graph.node if node.op_type == "Conv" and len(node.input) == 3)
    size = Graph(model).array(conv.input[2]).size
    for name, values in (("b_q", np.ones(size, np.int32)), ("b_s", np.full(size, 1e-3, np.float16))):
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    model.graph.node.append(helper.make_node("DequantizeLinear", ["b_q", "b_s"], ["b"], "bias", axis=0))
    conv.input[2] = "b"


def _computed_weights(model: onnx.ModelProto) -> None:
    """An int8 constant that an Identity hands to the DQ."""
    graph = Graph(model)
    dq = graph.writer(_first(model, "Conv").input[1])
    quantize = graph.writer(dq.input[0])
    weights = np.ones(graph.array(quantize.input[0]).shape, np.int8)
    model.graph.node.remove(quantize)
    model.graph.initializer.append(numpy_helper.from_array(weights, "w8"))
    model.graph.node.append(helper.make_node("Identity", ["w8"], ["computed"], "identity"))
    dq.input[0] = "computed"


def _as_matmul(model: onnx.ModelProto) -> onnx.NodeProto:
    """Write the Gemm as a MatMul, its weights as [K, N]; return the weights' DQ."""
    graph, gemm = Graph(model), _first(model, "Gemm")
    dq = graph.writer(gemm.input[1])
    quantize = graph.writer(dq.input[0])
    _replace(model, quantize.input[0], np.ascontiguousarray(graph.array(quantize.input[0]).T))
    for node in (quantize, dq):
        next(attribute for attribute in node.attribute if attribute.name == "axis").i = 1
    gemm.op_type = "MatMul"
    del gemm.attribute[:], gemm.input[2:]
    return dq


def _wrong_axis_of_matmul(model: onnx.ModelProto) -> None:
    _as_matmul(model).attribute[0].i = 0


def _pair_moved_to_the_branch(model: onnx.ModelProto) -> None:
    graph, add = Graph(model), _first(model, "Add")
    (branch,) = (name for name in add.input if graph.writer_op(name) == "Conv")
    (skip,) = set(add.input) - {branch}
    add.input[list(add.input).index(skip)] = graph.before_pair(skip)
    _pair_on(model, branch)


def _full_precision_scale(model: onnx.ModelProto) -> None:
    name = _activation_pair(model).input[1]
    _replace(model, name, Graph(model).array(name).astype(np.float32))


def _subnormal_scale(model: onnx.ModelProto) -> None:
    _replace(model, _activation_pair(model).input[1], np.array(3e-6, np.float16))


def _full_precision_pooling(model: onnx.ModelProto) -> None:
    pool = _first(model, "ReduceMean")
    before = helper.make_node("Cast", [pool.input[0]], ["single"], "to single", to=TensorProto.FLOAT)
    after = helper.make_node("Cast", ["pooled"], [pool.output[0]], "to half", to=TensorProto.FLOAT16)
    pool.input[0], pool.output[0] = "single", "pooled"
    model.graph.node.extend([before, after])


def _full_precision_bias(model: onnx.ModelProto) -> None:
    name = _first(model, "Gemm").input[2]
    _replace(model, name, Graph(model).array(name).astype(np.float32))


def _early_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 18


def _second_cast(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Cast", ["images"], ["other"], to=TensorProto.FLOAT16))


def _late_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 21


def _on_the_skip_again(model: onnx.ModelProto) -> None:
    """A second pair on a tensor that has one."""
    pair = _activation_pair(model)
    scale, zero = pair.input[1:3]
    reader = next(node for node in model.graph.node if node.op_type == "Conv" and node.input[0] == _dq_of(model, pair))
    model.graph.node.append(helper.make_node("QuantizeLinear", [pair.input[0], scale, zero], ["again_q"], "again_q"))
    model.graph.node.append(helper.make_node("DequantizeLinear", ["again_q", scale, zero], ["again"], "again_dq"))
    reader.input[0] = "again"


def _dq_of(model: onnx.ModelProto, pair: onnx.NodeProto) -> str:
    return next(node.output[0] for node in model.graph.node if node.input and node.input[0] == pair.output[0])


def _many_scales(model: onnx.ModelProto) -> None:
    _replace(model, _activation_pair(model).input[1], np.full(3, 0.1, np.float16))


def _half_a_pair(model: onnx.ModelProto) -> None:
    pair = _activation_pair(model)
    model.graph.node.append(helper.make_node("Identity", [pair.output[0]], ["eight bits"], "reads the Q itself"))


def _two_scales(model: onnx.ModelProto) -> None:
    name = _dq_of(model, _activation_pair(model))
    node = next(node for node in model.graph.node if node.output[0] == name)
    model.graph.initializer.append(numpy_helper.from_array(np.array(0.5, np.float16), "another scale"))
    node.input[1] = "another scale"


def _behind_pad(model: onnx.ModelProto) -> None:
    pair = _activation_pair(model)
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(8, np.int64), "pads"))
    model.graph.node.append(helper.make_node("Pad", [pair.input[0], "pads"], ["padded"], "pad"))
    pair.input[0] = "padded"


def _pair_for_relu(model: onnx.ModelProto) -> None:
    last = _first(model, "ReduceMean")
    source = last.input[0]
    model.graph.node.append(helper.make_node("Relu", [source], ["again relu"], "again relu"))
    last.input[0] = "again relu"
    scale, zero = _activation_pair(model).input[1:3]
    relu = model.graph.node[-1]
    model.graph.node.append(helper.make_node("QuantizeLinear", [source, scale, zero], ["own_q"], "own_q"))
    model.graph.node.append(helper.make_node("DequantizeLinear", ["own_q", scale, zero], ["own_dq"], "own_dq"))
    relu.input[0] = "own_dq"


SPOILT: list[tuple[Edit, str, bool]] = [
    (_zero_point, "symmetric-int8", True),
    (_unsigned, "symmetric-int8", True),
    (_negative_scale, "positive-scale", True),
    (_many_scales, "per-tensor", True),
    (_half_a_pair, "pair", True),
    (_two_scales, "pair", True),
    (_between_conv_and_clip, "conv-activation", False),
    (_on_gemm, "gemm-output", False),
    (_in_normalisation, "normalisation", False),
    (_both_branches, "residual-branch", False),
    (_pair_moved_to_the_branch, "residual-branch", False),
    (_plain_skip, "residual-skip", False),
    (_unpaired_weights, "weights-and-data", False),
    (_computed_weights, "weight-source", True),
    (_wrong_axis, "weight-axis", True),
    (_wrong_axis_of_matmul, "weight-axis", True),
    (_int32_bias, "float-bias", True),
    (_quantiser_bias, "float-bias", True),
    (_second_cast, "uint8-cast", True),
    (_late_opset, "opset", True),
    (_early_opset, "opset", True),
    (_on_the_skip_again, "shared-pair", False),
    (_behind_pad, "pad-conv", True),
    (_pair_for_relu, "own-pair", False),
    (_full_precision_scale, "half-precision", False),
    (_subnormal_scale, "half-precision", False),
    (_full_precision_pooling, "half-precision", False),
    (_full_precision_bias, "half-precision", False),
]


@pytest.mark.parametrize(("spoil", "rule", "refused"), SPOILT, ids=[spoil.__name__[1:] for spoil, _, _ in SPOILT])
def test_a_spoilt_graph_breaks_that_rule_alone(trt: Path, spoil: Edit, rule: str, refused: bool) -> None:
    model = onnx.load(trt)
    spoil(model)
    found = broken_rules(model)
    assert {broken.rule for broken in found} == {rule}
    assert {broken.refused for broken in found} == {refused}
    line = found[0].render()
    assert line.startswith(f"{found[0].node}: {rule} (")
    assert RULES[rule].fix in line
    assert "\n" not in line


def test_every_rule_is_spoilt_once() -> None:
    assert {rule for _, rule, _ in SPOILT} == set(RULES)


def _constant_nodes(model: onnx.ModelProto) -> None:
    """Scales and zero points as Constant nodes, as other exporters write them."""
    quantized = [n for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    names = {name for node in quantized for name in node.input[1:]}
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name in names]:
        model.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
        model.graph.initializer.remove(tensor)


def _axis_from_the_end(model: onnx.ModelProto) -> None:
    weights = Graph(model).writer(_first(model, "Conv").input[1])
    next(attribute for attribute in weights.attribute if attribute.name == "axis").i = -4


def _no_zero_points_of_dq(model: onnx.ModelProto) -> None:
    """What a DQ reads has its type already."""
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear":
            del node.input[2]


@pytest.mark.parametrize("rewrite", [_constant_nodes, _axis_from_the_end, _no_zero_points_of_dq, _as_matmul])
def test_another_spelling_keeps_every_rule(trt: Path, rewrite: Callable[[onnx.ModelProto], object]) -> None:
    model = onnx.load(trt)
    rewrite(model)
    assert broken_rules(model) == []


def test_a_graph_in_floating_point_breaks_none(lite0_onnx: Path) -> None:
    assert broken_rules(onnx.load(lite0_onnx)) == []


def test_one_line_tells_how_much_is_single_precision(trt: Path) -> None:
    model = onnx.load(trt)
    for name in {node.input[1] for node in model.graph.node if node.op_type == "QuantizeLinear"}:
        _replace(model, name, Graph(model).array(name).astype(np.float32))
    (broken,) = broken_rules(model)
    pairs = sum(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node)
    assert (broken.rule, broken.found) == ("half-precision", f"an FP32 scale, and {pairs - 1} nodes more in FP32")


def _pruned(backbone: nn.Module) -> nn.Module:
    """Drop a quarter of the channels, as `edgefg prune` would."""
    example = torch.zeros(1, 3, 64, 64)
    importance = torch_pruning.importance.MagnitudeImportance()
    ignored = [head_of(backbone)]
    torch_pruning.pruner.BasePruner(backbone, example, importance, pruning_ratio=0.25, ignored_layers=ignored).step()
    return backbone


@pytest.mark.parametrize(
    ("backbone", "change"),
    [
        ("resnet18", None),
        ("resnet10t", _pruned),
        ("mobilenetv3_small_050", None),
        ("regnetx_002", None),
        ("mobilenetv4_conv_small_035", None),
        ("tf_efficientnet_lite0", None),
    ],
)
def test_our_graphs_keep_every_rule(
    backbone: str, change: Callable[[nn.Module], nn.Module] | None, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    spec = InputSpec(height=64, width=64)
    built = build_backbone(backbone, 5)
    network = build("plain", change(built) if change else built, (127.0,) * 3, (128.0,) * 3, {}).eval()
    write_onnx(network, spec, tmp_path / "fp32.onnx", batch=1)
    inputs = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
    assert quantize_tensorrt(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", inputs) == ""
    report = check(tmp_path / "int8.onnx")
    assert report.broken == ()
    assert report.quantised > 20
    assert report.rules == len(RULES)
