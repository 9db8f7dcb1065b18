"""The rules of explicit quantisation: our graphs keep all, and a graph spoilt in one way breaks that rule alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch_pruning
from onnx import helper
from onnxruntime.quantization import QuantFormat, quantize_dynamic, quantize_static
from torch import nn

from edgefg.data.calibration import Calibration
from edgefg.export.onnx.check import check
from edgefg.export.onnx.fp16 import BatchReader
from edgefg.export.onnx.graph import Graph
from edgefg.export.onnx.rules import FULL_PRECISION, RULES, broken_rules, full_precision_reason
from edgefg.export.tracing.onnx_exporter import write_onnx
from edgefg.preprocess import InputSpec
from edgefg.quiet import quiet
from edgefg.training.methods import build
from edgefg.training.models.backbone import build_backbone, head_of
from tests.export.quantizing import quantize_tensorrt
from tests.export.spoilt import (
    SPOILT,
    Edit,
    as_matmul,
    first,
    full_precision_bias,
    full_precision_scale,
    subnormal_scale,
)


@pytest.fixture
def single(lite0_onnx: Path, calibration: Calibration, tmp_path: Path) -> onnx.ModelProto:
    """An INT8 graph whose rest is FP32, without a word why."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgefg.export.targets.tensorrt._rest_to_half", lambda *_: "")
        quantize_tensorrt(lite0_onnx, tmp_path / "m.onnx", calibration.inputs[:4])
    return onnx.load(tmp_path / "m.onnx")


@pytest.mark.parametrize(("spoil", "rule", "refused"), SPOILT, ids=[spoil.__name__ for spoil, _, _ in SPOILT])
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
    weights = Graph(model).writer(first(model, "Conv").input[1])
    next(attribute for attribute in weights.attribute if attribute.name == "axis").i = -4


def _no_zero_points_of_dq(model: onnx.ModelProto) -> None:
    """What a DQ reads has its type already."""
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear":
            del node.input[2]


@pytest.mark.parametrize("rewrite", [_constant_nodes, _axis_from_the_end, _no_zero_points_of_dq, as_matmul])
def test_another_spelling_keeps_every_rule(trt: Path, rewrite: Callable[[onnx.ModelProto], object]) -> None:
    model = onnx.load(trt)
    rewrite(model)
    assert broken_rules(model) == []


def test_a_graph_in_floating_point_breaks_none(lite0_onnx: Path) -> None:
    assert broken_rules(onnx.load(lite0_onnx)) == []


def test_one_line_tells_how_much_is_single_precision(trt: Path, single: onnx.ModelProto) -> None:
    (broken,) = broken_rules(single)
    pairs = sum(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in single.graph.node)
    assert broken.rule == "half-precision"
    assert int(re.search(r", and (\d+) nodes more in FP32$", broken.found)[1]) > pairs
    single.metadata_props.add(key=FULL_PRECISION, value="this network\ndoes not bear FP16")
    assert broken_rules(single) == []
    assert full_precision_reason(single) == "this network does not bear FP16"
    assert full_precision_reason(onnx.load(trt)) == ""


def test_a_reason_for_fp32_excuses_nothing_else(trt: Path) -> None:
    for spoil, rule in ((subnormal_scale, "half-precision"), (full_precision_scale, "one-type")):
        model = onnx.load(trt)
        model.metadata_props.add(key=FULL_PRECISION, value="why not")
        spoil(model)
        assert [broken.rule for broken in broken_rules(model)] == [rule]


def test_mixed_types_are_what_onnx_refuses(trt: Path) -> None:
    """Its full check names the same node, without ours knowing of it."""
    for spoil in (full_precision_scale, full_precision_bias):
        model = onnx.load(trt)
        spoil(model)
        (broken,) = broken_rules(model)
        assert broken.found.startswith("inputs of FLOAT and FLOAT16")
        with pytest.raises(onnx.shape_inference.InferenceError) as caught:
            onnx.checker.check_model(model, full_check=True)
        assert broken.node in str(caught.value)


def test_onnx_runtimes_other_formats_are_refused(lite0_onnx: Path, tmp_path: Path) -> None:
    def read(name: str) -> set[str]:
        model = onnx.load(tmp_path / name)
        (broken,) = (broken for broken in broken_rules(model) if broken.rule == "explicit-qdq")
        return set(broken.found.partition(": ")[2].split(", ")) & {node.op_type for node in model.graph.node}

    with quiet():
        quantize_dynamic(lite0_onnx, tmp_path / "dynamic.onnx")
        images = BatchReader(np.zeros((2, 1, 64, 64, 3), np.uint8))
        quantize_static(lite0_onnx, tmp_path / "static.onnx", images, quant_format=QuantFormat.QOperator)
    assert read("dynamic.onnx") == {"DynamicQuantizeLinear", "ConvInteger", "MatMulInteger"}
    assert {"QLinearConv", "QLinearAdd"} <= read("static.onnx")


def test_a_node_without_a_name_is_named_by_what_it_writes(trt: Path) -> None:
    for spoil, rule, _ in SPOILT:
        model = onnx.load(trt)
        spoil(model)
        for node in model.graph.node:
            node.name = ""
        outputs = {f"{node.op_type} → {node.output[0]}" for node in model.graph.node}
        for broken in broken_rules(model):
            assert broken.rule == rule
            assert broken.node in outputs | {"graph", "images"}
            assert broken.render().startswith(f"{broken.node}: {rule} (")


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
        pytest.param("resnet18", None, marks=pytest.mark.slow),
        ("resnet10t", _pruned),
        pytest.param("mobilenetv3_small_050", None, marks=pytest.mark.slow),
        pytest.param("regnetx_002", None, marks=pytest.mark.slow),
        pytest.param("mobilenetv4_conv_small_035", None, marks=pytest.mark.slow),
        pytest.param("tf_efficientnet_lite0", None, marks=pytest.mark.slow),
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
