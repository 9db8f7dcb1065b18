"""TensorRT: its rules on the quantised graph, FP16 in the rest, and its accuracy on unseen content."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edgefg.data.calibration import Calibration
from edgefg.errors import ExportError
from edgefg.export.onnx.check import check
from edgefg.export.onnx.graph import Graph
from edgefg.export.onnx.rules import broken_rules, skip_tensors
from edgefg.export.quantize.quantizer import lacks_vnni
from edgefg.preprocess import UInt8Array
from tests.export.openvino_cpu import compile_for_cpu
from tests.export.quantizing import logits_of, quantize_tensorrt


def test_the_graph_keeps_every_rule(trt: Path, resnet_trt: tuple[Path, Path]) -> None:
    for path in (trt, resnet_trt[1]):
        onnx.checker.check_model(onnx.load(path), full_check=True)
        assert broken_rules(onnx.load(path)) == []


def test_the_graph_spelt_out(trt: Path) -> None:
    """The same without our own checker, so that the two do not share a mistake."""
    model = onnx.load(trt)
    writer = {name: node for node in model.graph.node for name in node.output}
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    pairs = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert all(constants[node.input[2]].dtype == np.int8 and not constants[node.input[2]].any() for node in pairs)
    convolutions = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(convolutions) == 50
    for node in convolutions:
        data, weights = (writer[name] for name in node.input[:2])
        assert (data.op_type, weights.op_type) == ("DequantizeLinear", "DequantizeLinear")
        assert constants[data.input[1]].size == 1
        assert constants[weights.input[1]].shape == (constants[writer[weights.input[0]].input[0]].shape[0],)
        assert all(name in constants for name in node.input[2:]), "the bias stays floating point"
    for node in model.graph.node:
        if node.op_type == "Clip":
            assert writer[node.input[0]].op_type == "Conv"
        if node.op_type == "Add":
            assert sorted(writer[name].op_type for name in node.input) == ["Conv", "DequantizeLinear"]
    assert (writer["logits"].op_type, writer[writer["logits"].input[0]].op_type) == ("Cast", "Gemm")
    assert {array.dtype for array in constants.values()} <= {np.dtype(kind) for kind in ("float16", "int8", "int64")}
    assert [node.op_type for node in model.graph.node if "images" in node.input] == ["Cast"]
    quantised = [node.input[0] for node in pairs if node.op_type == "QuantizeLinear"]
    assert len(quantised) == len(set(quantised)), "one shared pair a tensor"


def test_skip_convolution_takes_the_pair(resnet_trt: tuple[Path, Path]) -> None:
    fp32, int8 = (onnx.load(path) for path in resnet_trt)
    before, after = Graph(fp32), Graph(int8)
    adds = [node for node in before.nodes if node.op_type == "Add"]
    double = [node for node in adds if [before.writer_op(name) for name in node.input] == ["Conv", "Conv"]]
    assert double, "needed a block whose skip is a convolution"
    skips = skip_tensors(fp32)
    assert len(skips) == len(adds)
    for add in double:
        (skip,) = set(add.input) & set(skips)
        kernels = [before.array(before.writer(name).input[1]).shape[2:] for name in (skip, *set(add.input) - {skip})]
        assert kernels == [(1, 1), (3, 3)]
    for add in (node for node in after.nodes if node.op_type == "Add"):
        assert sorted(after.writer_op(name) for name in add.input) == ["Conv", "DequantizeLinear"]


def test_a_graph_that_stays_fp32_states_why_and_keeps_every_rule(
    resnet_trt: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgefg.export.onnx.fp16._GREATEST", 1.0)
    inputs = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    why = quantize_tensorrt(resnet_trt[0], tmp_path / "m.onnx", inputs, batch=2)
    assert why.endswith("keep FP32")
    report = check(tmp_path / "m.onnx")
    assert (report.broken, report.float32) == ((), why)
    assert report.render().endswith(f": all hold; floating point is FP32: {why}")
    assert check(resnet_trt[1]).float32 == ""


def test_refused_graph_is_an_error(
    lite0_onnx: Path, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgefg.export.onnx.rules._OPSETS", range(13, 15))
    with pytest.raises(
        ExportError,
        match=r"TensorRT would refuse the quantised graph: graph: opset \(refused\): opset 19; expected opset 13 to 20",
    ):
        quantize_tensorrt(lite0_onnx, tmp_path / "m.onnx", calibration.inputs[:2])


@pytest.mark.skipif(lacks_vnni(), reason="OpenVINO saturates with 8-bit weights on a CPU without VNNI")
def test_the_plans_accuracy_is_estimated_on_two_cpu_runtimes(lite0_onnx: Path, trt: Path, unseen: UInt8Array) -> None:
    """Without a GPU the all-int8 graph itself is the best estimate of a plan's accuracy: two engines run it and agree.

    Measured, in shares of the greatest logit: the engines differ by 0.03 on average and 0.11 at most, from FP32 by 0.05
    and 0.18; 57 of 58 decided classes are the same in both, 56 to 57 the same as in FP32.
    """
    expected, first = logits_of(lite0_onnx, unseen), logits_of(trt, unseen)
    compiled = compile_for_cpu(trt)
    second = np.concatenate([compiled([row[None]])[0] for row in unseen])
    largest = np.abs(expected).max()
    ordered = np.sort(expected, axis=1)
    decided = ordered[:, -1] - ordered[:, -2] > 0.1 * largest
    assert decided.sum() > 50
    for found, other, mean, most, agreement in (
        (first, second, 0.05, 0.2, 0.93),
        (first, expected, 0.08, 0.3, 0.9),
        (second, expected, 0.08, 0.3, 0.9),
    ):
        deviation = np.abs(found - other) / largest
        assert 0 < deviation.mean() <= mean
        assert deviation.max() <= most
        assert (found.argmax(1) == other.argmax(1))[decided].mean() >= agreement
