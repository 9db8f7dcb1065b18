"""FP16 graphs, and INT8 graphs whose rest is FP16: types, scales, and that the numbers hold on two CPU runtimes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from edgefg import __version__
from edgefg.data.calibration import Calibration
from edgefg.errors import ExportError
from edgefg.export.export import export_checkpoint
from edgefg.export.onnx import fp16 as half_module
from edgefg.export.onnx.fp16 import _round_up, rest_to_half, to_half
from edgefg.export.onnx.fp16_blocklist import fp16_blocklist
from edgefg.export.onnx.graph import Graph
from edgefg.export.onnx.rules import broken_rules
from edgefg.export.targets import tensorrt
from edgefg.export.tracing.onnx_exporter import torch_logits, write_onnx
from edgefg.preprocess import InputSpec, UInt8Array
from edgefg.runtimes.onnxruntime import EXACT_SUMS
from edgefg.settings.split import SplitSpec
from edgefg.training.checkpoint import SCHEMA, Header, save
from edgefg.training.methods import build
from edgefg.training.models.backbone import build_backbone
from edgefg.training.models.bcnn import BCNN
from tests.export.openvino_cpu import compile_for_cpu
from tests.export.quantizing import quantize_tensorrt

Level = onnxruntime.GraphOptimizationLevel


@pytest.fixture(scope="module")
def full(lite0_onnx: Path, calibration: Calibration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The INT8 graph with its rest in FP32."""
    path = tmp_path_factory.mktemp("full") / "model.onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensorrt, "_rest_to_half", lambda *_: "kept for the test")
        assert quantize_tensorrt(lite0_onnx, path, calibration.inputs) == "kept for the test"
    return path


@pytest.fixture(scope="module")
def half(full: Path) -> Path:
    """The same with its rest in FP16."""
    path = full.with_name("half.onnx")
    onnx.save(rest_to_half(onnx.load(full)), path)
    return path


def _logits(path: Path, inputs: UInt8Array, level: Any = Level.ORT_ENABLE_ALL) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.log_severity_level = 3
    options.add_session_config_entry(*EXACT_SUMS)
    session = onnxruntime.InferenceSession(path, options)
    return np.concatenate([session.run(None, {"images": row[None]})[0] for row in inputs])


def _openvino_logits(path: Path, inputs: UInt8Array) -> np.ndarray:
    compiled = compile_for_cpu(path)
    return np.concatenate([compiled([row[None]])[0] for row in inputs])


def test_types(full: Path, half: Path) -> None:
    before, after = onnx.load(full), onnx.load(half)
    onnx.checker.check_model(after, full_check=True)
    assert Graph(after).opset == 19
    allowed = {TensorProto.FLOAT16, TensorProto.INT8, TensorProto.INT64}
    assert {tensor.data_type for tensor in after.graph.initializer} <= allowed
    assert [node.op_type for node in after.graph.node if "images" in node.input] == ["Cast"]
    assert Graph(after).writer_op("logits") == "Cast"
    assert after.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    kinds = [sorted(node.op_type for node in model.graph.node) for model in (before, after)]
    assert sorted([*kinds[0], "Cast"]) == kinds[1], "one Cast at the output and nothing else comes or goes"


def test_half_precision_is_the_only_rule_that_the_full_graph_breaks(full: Path, half: Path) -> None:
    model = onnx.load(full)
    assert broken_rules(model) == [], "it states why"
    del model.metadata_props[:]
    assert [broken.rule for broken in broken_rules(model)] == ["half-precision"]
    assert broken_rules(onnx.load(half)) == []


def test_scales_are_normal_and_not_below_the_calibrated_ones(full: Path, half: Path) -> None:
    before, after = Graph(onnx.load(full)), Graph(onnx.load(half))
    names = {node.input[1] for node in before.nodes if node.op_type == "QuantizeLinear"}
    assert len(names) == 100
    for name in names:
        old, new = before.array(name), after.array(name)
        assert (new.dtype, new.shape) == (np.float16, old.shape)
        assert (new >= 2.0**-14).all()
        assert (new.astype(np.float64) >= old).all()


def test_every_bias_can_be_counted_in_fp16(full: Path, half: Path) -> None:
    """ONNX Runtime divides a bias by both scales in FP16; few channels need coarser weights for that."""
    before, after = Graph(onnx.load(full)), Graph(onnx.load(half))
    channels = coarser = 0
    for node in (node for node in after.nodes if node.op_type in ("Conv", "Gemm")):
        data, weights = (after.writer(name).input[1] for name in node.input[:2])
        product = after.array(data) * after.array(weights)
        assert product.dtype == np.float16
        assert (product > 0).all()
        assert np.isfinite(after.array(node.input[2]) / product).all()
        channels += product.size
        # Rounding up adds a thousandth, and the least normal number is no coarseness that matters.
        coarser += (after.array(weights) > 1.01 * np.maximum(before.array(weights), 2.0**-14)).sum()
    assert 0 < coarser < 0.02 * channels


@pytest.mark.parametrize(
    "level",
    [
        pytest.param(Level.ORT_DISABLE_ALL, marks=pytest.mark.slow),
        pytest.param(Level.ORT_ENABLE_BASIC, marks=pytest.mark.slow),
        Level.ORT_ENABLE_ALL,
    ],
)
def test_numbers_hold_at_every_level_of_optimisation(level: Any, full: Path, half: Path, unseen: UInt8Array) -> None:
    """Where a bias overflows, as with ONNX Runtime's own converter alone, optimised graphs agree on no class."""
    expected = _logits(full, unseen)
    found = _logits(half, unseen, level)
    deviation = np.abs(found - expected) / np.abs(expected).max()
    assert 0 < deviation.mean() <= 0.06  # measured 0.035; two engines differ by 0.03 on one and the same graph
    ordered = np.sort(expected, axis=1)
    decided = ordered[:, -1] - ordered[:, -2] > 0.1 * np.abs(expected).max()
    assert decided.sum() > 50
    assert (found.argmax(1) == expected.argmax(1))[decided].mean() >= 0.9  # measured 0.98


def test_a_floating_point_network_in_fp16(lite0_onnx: Path, unseen: UInt8Array, tmp_path: Path) -> None:
    to_half(lite0_onnx, tmp_path / "half.onnx", list(unseen[:2, None]))
    expected = _logits(lite0_onnx, unseen)
    for found in (_logits(tmp_path / "half.onnx", unseen), _openvino_logits(tmp_path / "half.onnx", unseen)):
        assert 0 < np.abs(found - expected).max() <= 0.01 * np.abs(expected).max()
    assert Graph(onnx.load(tmp_path / "half.onnx")).opset == Graph(onnx.load(lite0_onnx)).opset


def test_rounding_up_for_every_size_of_number() -> None:
    values = np.concatenate([np.geomspace(1e-12, 65504, 20_001), np.arange(1, 65505, 7), [2.0**-14, 1 + 2.0**-10]])
    rounded = _round_up("scales", values)
    np.testing.assert_array_equal(rounded.astype(np.float16).astype(np.float64), rounded)
    assert (rounded >= np.maximum(values, 2.0**-14)).all()
    normal = values >= 2.0**-14
    assert (rounded[normal] <= values[normal] * (1 + 2.0**-10)).all()


def test_weights_beyond_fp16_are_refused(lite0_onnx: Path, tmp_path: Path) -> None:
    graph = onnx.load(lite0_onnx)
    tensor = next(t for t in graph.graph.initializer if t.data_type == TensorProto.FLOAT and t.dims)
    tensor.CopyFrom(numpy_helper.from_array(np.full(list(tensor.dims), 7e4, np.float32), tensor.name))
    onnx.save(graph, tmp_path / "large.onnx")
    with pytest.raises(ExportError, match=r"holds 70000, FP16 reaches 65504; keep FP32"):
        to_half(tmp_path / "large.onnx", tmp_path / "half.onnx", [])
    (tmp_path / "empty.onnx").write_bytes(b"")
    with pytest.raises(ExportError, match="could not be cast to FP16"):
        to_half(tmp_path / "empty.onnx", tmp_path / "half.onnx", [])
    assert not (tmp_path / "half.onnx").exists()


def _convolutions(path: Path, *weights: float) -> Path:
    """A network of 1 x 1 convolutions, one after another, each with one weight throughout."""
    shapes = [(2, 3, 1, 1), *[(2, 2, 1, 1)] * (len(weights) - 1)]
    constants = [
        numpy_helper.from_array(np.full(shape, value, np.float32), f"w{i}")
        for i, (shape, value) in enumerate(zip(shapes, weights, strict=True))
    ]
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["t0"], "transpose", perm=[0, 3, 1, 2]),
    ]
    names = [f"t{i}" for i in range(len(weights))] + ["logits"]
    for i in range(len(weights)):
        nodes.append(helper.make_node("Conv", [names[i], f"w{i}"], [names[i + 1]], f"conv{i}"))
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, [1, 8, 8, 3])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 2, 8, 8])
    graph = helper.make_graph(nodes, "g", [images], [logits], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def test_activations_beyond_fp16_are_refused(tmp_path: Path) -> None:
    source = _convolutions(tmp_path / "a.onnx", 1e3, 1e-4)
    bright, dark = ([np.full((1, 8, 8, 3), level, np.uint8)] for level in (200, 10))
    with pytest.raises(ExportError, match=r"activations of t1 reach 600000, allowed are 32752; keep FP32"):
        to_half(source, tmp_path / "half.onnx", bright)
    assert not (tmp_path / "half.onnx").exists()
    to_half(source, tmp_path / "half.onnx", dark)
    for logits in (_logits(tmp_path / "half.onnx", bright[0]), _openvino_logits(tmp_path / "half.onnx", bright[0])):
        assert np.isfinite(logits).all(), "an engine of the CPU shows the overflow: let it judge in place of the ranges"


@pytest.mark.parametrize(
    ("weights", "why"),
    [
        ((1e-3, 1.0), ""),
        ((1e3, 1e-4), "activations of t1 reach .*, allowed are 32752; keep FP32"),
        ((1e-7, 1e4), "with FP16 the logits are .* away from the FP32 network's, with FP32 .*"),
        ((6e4, 1e-4), ".* holds .*, FP16 reaches 65504; keep FP32"),
    ],
)
def test_a_network_that_does_not_bear_fp16_keeps_fp32(weights: tuple[float, ...], why: str, tmp_path: Path) -> None:
    source = _convolutions(tmp_path / "a.onnx", *weights)
    inputs = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    said = quantize_tensorrt(source, tmp_path / "b.onnx", inputs)
    assert re.fullmatch(why, said), said
    graph = Graph(onnx.load(tmp_path / "b.onnx"))
    scales = {graph.array(node.input[1]).dtype for node in graph.nodes if node.op_type == "QuantizeLinear"}
    assert scales == {np.dtype("float32" if why else "float16")}
    expected, found = _logits(source, inputs), _logits(tmp_path / "b.onnx", inputs)
    assert np.abs(found - expected).mean() <= 0.05 * np.abs(expected).max()


BILINEAR: dict[str, Any] = {"projection": 16}


def _bilinear(scale: float) -> BCNN:
    """A B-CNN with maps of a chosen size."""
    torch.manual_seed(0)
    network = build("bcnn", build_backbone("test_resnet", 4), (127.0,) * 3, (127.0,) * 3, BILINEAR).eval()
    assert isinstance(network, BCNN)
    for module in network.backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # timm starts the last one of a branch at 0
            torch.nn.init.uniform_(module.weight, 0.5, 1.0)
    projection = network.projections[0]
    assert isinstance(projection, torch.nn.Conv2d)
    with torch.no_grad():
        projection.weight.mul_(scale)
    return network


class Conv(OpRun):
    """A convolution that sums in FP32 and rounds once, as tensor cores do; ONNX's own takes minutes in FP16."""

    op_domain = ""

    def _run(self, x: np.ndarray, weights: np.ndarray, bias: np.ndarray | None = None, **how: Any) -> tuple[np.ndarray]:
        top, left, bottom, right = how["pads"]
        planes, kernels = (torch.tensor(a).float() for a in (x, weights))
        shifts = None if bias is None else torch.tensor(bias).float()
        planes = torch.nn.functional.pad(planes, (left, right, top, bottom))
        options = (how["strides"], 0, how["dilations"], how["group"])
        return (torch.nn.functional.conv2d(planes, kernels, shifts, *options).numpy().astype(x.dtype),)


def _simulated(path: Path, inputs: UInt8Array) -> np.ndarray:
    """The logits in the types that the graph has: ONNX's reference computes FP16 in FP16, unlike any CPU engine."""
    evaluator = ReferenceEvaluator(onnx.load(path), new_ops=[Conv])
    with np.errstate(all="ignore"):
        return np.concatenate([np.asarray(evaluator.run(None, {"images": row[None]})[0]) for row in inputs])


def _frames() -> UInt8Array:
    return np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)


@pytest.mark.parametrize("scale", [1e-2, 2e3, 1e4])  # the products vanish beside ε, their sum overflows, and they do
def test_a_bilinear_network_bears_real_half_precision(
    scale: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, inputs = _bilinear(scale), _frames()[:1]
    header = Header(
        schema=SCHEMA, kind="teacher", method="bcnn", options=BILINEAR, backbone="test_resnet", labels=tuple("abcd"),
        input=InputSpec(height=32, width=32), mean=(127.0,) * 3, std=(127.0,) * 3, dataset="d" * 64, split=SplitSpec(),
        edgefg=__version__,
    )  # fmt: skip
    save(tmp_path / "t.safetensors", network, header)
    write_onnx(network, header.input, tmp_path / "full.onnx")
    model = export_checkpoint(tmp_path / "t.safetensors", tmp_path / "a", to="tensorrt-onnx", precision="fp16")
    assert broken_rules(onnx.load(model)) == []
    expected = torch_logits(network, inputs)
    allowed = 0.01 * np.abs(expected).max()
    assert np.abs(_simulated(model, inputs) - expected).max() <= allowed
    monkeypatch.setattr(half_module, "fp16_blocklist", lambda *_, **__: set())
    monkeypatch.setattr(half_module, "activation_overflow", lambda *_, **__: "")
    to_half(tmp_path / "full.onnx", tmp_path / "all.onnx", [])
    assert not np.abs(_simulated(tmp_path / "all.onnx", inputs) - expected).max() <= 10 * allowed, (
        "all cast is no worse"
    )


def _in_fp32(model: onnx.ModelProto) -> list[str]:
    """The operators that compute in FP32, by the inferred types of what they write; casts aside."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in [*inferred.value_info, *inferred.output]}
    nodes = [node for node in model.graph.node if node.op_type != "Cast"]
    return [node.op_type for node in nodes if kinds[node.output[0]] == TensorProto.FLOAT]


def test_int8_of_a_bilinear_network_leaves_what_is_steep_in_fp32(tmp_path: Path) -> None:
    write_onnx(_bilinear(1.0), InputSpec(height=32, width=32), tmp_path / "full.onnx")
    assert quantize_tensorrt(tmp_path / "full.onnx", tmp_path / "m.onnx", _frames()) == ""
    model = onnx.load(tmp_path / "m.onnx")
    assert broken_rules(model) == []
    island = {"MatMul", "Reshape", "Relu", "Neg", "Add", "Sqrt", "Sub", "ReduceL2", "Clip", "Div"}
    assert set(_in_fp32(model)) == island
    # Of the input, two into the product, one out of the quotient, of the output: none between nodes in FP32.
    assert [node.op_type for node in model.graph.node].count("Cast") == 5
    root = next(node for node in model.graph.node if node.op_type == "MaxPool")
    model.graph.node.append(helper.make_node("Cast", [root.output[0]], ["single"], "single", to=TensorProto.FLOAT))
    model.graph.node.append(helper.make_node("Relu", ["single"], ["relu of it"], "relu of it"))
    assert [broken.node for broken in broken_rules(model)] == ["single"], "elsewhere FP32 is no better than before"


def test_a_plain_network_computes_its_pooling_alone_in_fp32(
    lite0_onnx: Path, half: Path, unseen: UInt8Array, tmp_path: Path
) -> None:
    to_half(lite0_onnx, tmp_path / "half.onnx", list(unseen[:1, None]))
    model = onnx.load(tmp_path / "half.onnx")
    assert _in_fp32(model) == ["ReduceMean"]
    assert [node.op_type for node in model.graph.node].count("Cast") == 4
    assert _in_fp32(onnx.load(half)) == []


@pytest.mark.parametrize(
    ("weights", "factor", "kept"),
    [
        ([0.5, 1e-9, 0.5, 0.5, 0.5, 0.5], 1.0, set()),  # of a channel that training has switched off
        ([1e-9] * 6, 1.0, {"planes"}),
        ([0.5] * 6, 1e-9, {"logits"}),
        ([1e-9] * 6, 1e-9, {"planes", "logits"}),
    ],
)
def test_constants_that_fp16_cannot_hold_keep_their_readers_in_fp32(
    weights: list[float], factor: float, kept: set[str], tmp_path: Path
) -> None:
    constants = [
        numpy_helper.from_array(np.array(weights, np.float32).reshape(2, 3, 1, 1), "w"),
        numpy_helper.from_array(np.full(2, 1e-9, np.float32), "bias"),
        numpy_helper.from_array(np.array(factor, np.float32), "factor"),
    ]
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], "", to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["turned"], "", perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["turned", "w", "bias"], ["planes"], ""),
        helper.make_node("Mul", ["planes", "factor"], ["logits"], ""),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, [1, 8, 8, 3])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 2, 8, 8])
    graph = helper.make_graph(nodes, "g", [images], [logits], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    assert fp16_blocklist(Graph(model), means=True) == kept
    onnx.save(model, tmp_path / "a.onnx")
    to_half(tmp_path / "a.onnx", tmp_path / "half.onnx", [np.full((1, 8, 8, 3), 200, np.uint8)])
    singles = {t.name for t in onnx.load(tmp_path / "half.onnx").graph.initializer if t.data_type == TensorProto.FLOAT}
    assert singles == {name for name, op in (("w", "planes"), ("bias", "planes"), ("factor", "logits")) if op in kept}
