"""The rules of explicit quantisation: our graphs keep all, and a graph spoilt in one way breaks that rule alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from edgefg.export.check import check
from edgefg.export.graph import Graph
from edgefg.export.quantize import quantize_tensorrt
from edgefg.export.rules import RULES, broken_rules
from edgefg.export.to_onnx import write_onnx
from edgefg.preprocess import InputSpec
from edgefg.training.methods import build
from edgefg.training.models.backbone import build_backbone
from tests.conftest import TINY

Edit = Callable[[onnx.ModelProto], None]
Run = Callable[..., tuple[int, str, str]]


def _first(model: onnx.ModelProto, op_type: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == op_type)


def _replace(model: onnx.ModelProto, name: str, values: np.ndarray) -> None:
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
    _replace(model, _activation_pair(model).input[1], np.array(-1, np.float32))


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


def _second_cast(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Cast", ["images"], ["other"], to=TensorProto.FLOAT))


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
    _replace(model, _activation_pair(model).input[1], np.full(3, 0.1, np.float32))


def _half_a_pair(model: onnx.ModelProto) -> None:
    pair = _activation_pair(model)
    model.graph.node.append(helper.make_node("Identity", [pair.output[0]], ["eight bits"], "reads the Q itself"))


def _two_scales(model: onnx.ModelProto) -> None:
    name = _dq_of(model, _activation_pair(model))
    node = next(node for node in model.graph.node if node.output[0] == name)
    model.graph.initializer.append(numpy_helper.from_array(np.array(0.5, np.float32), "another scale"))
    node.input[1] = "another scale"


def _behind_pad(model: onnx.ModelProto) -> None:
    pair = _activation_pair(model)
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(8, np.int64), "pads"))
    model.graph.node.append(helper.make_node("Pad", [pair.input[0], "pads"], ["padded"], "pad"))
    pair.input[0] = "padded"


def _pair_for_relu(model: onnx.ModelProto) -> None:
    last = _first(model, "GlobalAveragePool") if _has(model, "GlobalAveragePool") else _first(model, "ReduceMean")
    source = last.input[0]
    model.graph.node.append(helper.make_node("Relu", [source], ["again relu"], "again relu"))
    last.input[0] = "again relu"
    scale, zero = _activation_pair(model).input[1:3]
    relu = model.graph.node[-1]
    model.graph.node.append(helper.make_node("QuantizeLinear", [source, scale, zero], ["own_q"], "own_q"))
    model.graph.node.append(helper.make_node("DequantizeLinear", ["own_q", scale, zero], ["own_dq"], "own_dq"))
    relu.input[0] = "own_dq"


def _has(model: onnx.ModelProto, op_type: str) -> bool:
    return any(node.op_type == op_type for node in model.graph.node)


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
    (_plain_skip, "residual-skip", False),
    (_unpaired_weights, "weights-and-data", False),
    (_wrong_axis, "weight-axis", True),
    (_int32_bias, "float-bias", True),
    (_second_cast, "uint8-cast", True),
    (_late_opset, "opset", True),
    (_on_the_skip_again, "shared-pair", False),
    (_behind_pad, "pad-conv", True),
    (_pair_for_relu, "own-pair", False),
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


@pytest.mark.parametrize(
    "backbone",
    ["resnet18", "mobilenetv3_small_050", "regnetx_002", "mobilenetv4_conv_small_035", "tf_efficientnet_lite0"],
)
def test_our_graphs_keep_every_rule(backbone: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    spec = InputSpec(height=64, width=64)
    network = build("plain", build_backbone(backbone, 5), (127.0,) * 3, (128.0,) * 3, {}).eval()
    write_onnx(network, spec, tmp_path / "fp32.onnx", batch=1)
    inputs = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
    quantize_tensorrt(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", inputs)
    report = check(tmp_path / "int8.onnx")
    assert report.broken == ()
    assert report.quantised > 20
    assert report.rules == len(RULES)


def test_the_verb(trt: Path, tmp_path: Path, run: Run) -> None:
    status, out, _ = run("check", trt, "--for", "tensorrt")
    assert (status, out.endswith(f"{len(RULES)} rules: all hold\n")) == (0, True)
    model = onnx.load(trt)
    _many_scales(model)
    onnx.save(model, tmp_path / "bad.onnx")
    status, out, _ = run("check", tmp_path / "bad.onnx")
    assert status == 1
    assert "per-tensor: 3 scales on an activation; needed one scale for an activation: quantise constants" in out
    status, out, _ = run("check", tmp_path / "bad.onnx", "--json")
    assert status == 1
    assert {violation["rule"] for violation in json.loads(out)["broken"]} == {"per-tensor"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["missing.onnx"], "missing.onnx is no ONNX file that can be read"),
        ([TINY / "onnx" / "model.json"], "is no ONNX file that can be read"),
        ([TINY / "onnx" / "model.onnx", "--for", "coreml"], "--for 'coreml': no such choice; needed tensorrt"),
    ],
)
def test_bad_usage(words: list[object], said: str, run: Run) -> None:
    status, _, err = run("check", *words)
    assert (status, err.count("\n")) == (2, 1)
    assert said in err
