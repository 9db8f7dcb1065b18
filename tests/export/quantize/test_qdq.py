"""QDQ graphs of both ONNX targets: close to FP32 on unseen content, 7-bit weights, ranges, operators left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgefg.errors import ExportError
from edgefg.export.onnx.graph import Graph
from edgefg.preprocess import UInt8Array
from edgefg.settings.quantization import Calibrator
from tests.export.quantizing import assert_reduced_but_depthwise, logits_of, quantize_onnxruntime, quantize_tensorrt


@pytest.mark.slow
def test_7_bit_weights_leave_room_for_the_sum(resnet_trt: tuple[Path, Path], tmp_path: Path) -> None:
    inputs = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    for reduce_range, most in ((False, 127), (True, 64)):
        quantize_onnxruntime(resnet_trt[0], tmp_path / "m.onnx", inputs, batch=2, reduce_range=reduce_range)
        graph = Graph(onnx.load(tmp_path / "m.onnx"))
        int8 = [name for name, tensor in graph.constants.items() if tensor.data_type == TensorProto.INT8]
        weights = [graph.array(name) for name in int8 if graph.array(name).ndim == 4]
        assert len(weights) > 10
        assert abs(max(int(np.abs(values.astype(np.int32)).max()) for values in weights) - most) <= 1


def test_depthwise_weights_keep_8_bits(lite0_onnx: Path, unseen: UInt8Array, tmp_path: Path) -> None:
    """Their few products are not summed in pairs; with 7 bits they cost half of the signal to noise ratio."""
    quantize_onnxruntime(lite0_onnx, tmp_path / "m.onnx", unseen[:2], reduce_range=True)
    graph = Graph(onnx.load(tmp_path / "m.onnx"))
    int8 = [graph.array(name) for name, tensor in graph.constants.items() if tensor.data_type == TensorProto.INT8]
    assert_reduced_but_depthwise([values for values in int8 if values.ndim == 4])


def test_int8_agrees_with_fp32_on_unseen_content(lite0_onnx: Path, trt: Path, ort: Path, unseen: UInt8Array) -> None:
    expected = logits_of(lite0_onnx, unseen)
    decided = np.sort(expected, axis=1)[:, -1] - np.sort(expected, axis=1)[:, -2] > 0.1 * np.abs(expected).max()
    assert decided.sum() > 10
    for path in (trt, ort):
        found = logits_of(path, unseen)
        assert (found != expected).any(), "the graph is not quantised"
        agreement = (found.argmax(1) == expected.argmax(1))[decided].mean()
        assert agreement >= 0.9


@pytest.mark.slow
def test_calibrators_choose_other_ranges(resnet_trt: tuple[Path, Path], tmp_path: Path) -> None:
    fp32, _ = resnet_trt
    # One glaring pixel in many grey ones is what a percentile leaves out.
    inputs = np.full((40, 32, 32, 3), 128, np.uint8)
    inputs[0, 0, 0] = 255
    scales = {}
    calibrators: tuple[Calibrator, ...] = ("minmax", "percentile")
    for calibrator in calibrators:
        quantize_tensorrt(fp32, tmp_path / "m.onnx", inputs, batch=2, calibrator=calibrator)
        graph = Graph(onnx.load(tmp_path / "m.onnx"))
        names = sorted({node.input[1] for node in graph.nodes if node.op_type == "QuantizeLinear"})
        scales[calibrator] = np.array([float(graph.array(name)) for name in names if graph.array(name).ndim == 0])
    assert len(scales["minmax"]) > 10
    # One bin of the histogram may lie beyond the extreme, and FP16's rounding up adds a thousandth.
    assert (scales["percentile"] <= scales["minmax"] * 1.003).all()
    assert (scales["percentile"] < scales["minmax"] * 0.99).any()


def test_convolution_behind_a_pad_stays_in_floating_point(tmp_path: Path) -> None:
    weights = numpy_helper.from_array(np.ones((2, 3, 3, 3), np.float32), "w")
    pads = numpy_helper.from_array(np.array([0, 0, 1, 1, 0, 0, 1, 1]), "pads")
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["planes"], "transpose", perm=[0, 3, 1, 2]),
        helper.make_node("Pad", ["planes", "pads"], ["padded"], "pad", mode="reflect"),
        helper.make_node("Conv", ["padded", "w"], ["logits"], "conv"),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, [1, 8, 8, 3])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 2, 8, 8])
    graph = helper.make_graph(nodes, "g", [images], [logits], [weights, pads])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / "a.onnx")
    quantize_tensorrt(tmp_path / "a.onnx", tmp_path / "b.onnx", np.zeros((2, 8, 8, 3), np.uint8))
    assert "QuantizeLinear" not in {node.op_type for node in onnx.load(tmp_path / "b.onnx").graph.node}


def test_failures_of_onnx_runtime_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"")
    with pytest.raises(ExportError, match="ONNX Runtime could not quantise") as caught:
        quantize_onnxruntime(tmp_path / "bad.onnx", tmp_path / "m.onnx", np.zeros((1, 8, 8, 3), np.uint8))
    assert "\n" not in str(caught.value)
