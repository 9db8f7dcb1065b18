"""Q/DQ pairs: their parameters, and the graphs without them or with integer weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgefg.export.onnx.graph import Graph
from edgefg.export.onnx.session import graph_logits
from edgefg.export.quantize.pairs import activation_params, with_integer_weights, with_own_zeros, without_pairs


def _pair(data: str, scale: str, out: str, **axis: Any) -> list[onnx.NodeProto]:
    return [
        helper.make_node("QuantizeLinear", [data, scale, "zero"], [f"{out}_q"], f"{out}_q", **axis),
        helper.make_node("DequantizeLinear", [f"{out}_q", scale, "zero"], [out], out, **axis),
    ]


def _graph() -> onnx.ModelProto:
    """A matrix product whose data and weights take a pair; all pairs share one zero point."""
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], "cast", to=TensorProto.FLOAT),
        *_pair("float", "data_scale", "rounded"),
        *_pair("weights", "weight_scale", "rounded_weights"),
        helper.make_node("Gemm", ["rounded", "rounded_weights"], ["logits"], "gemm", transB=1),
    ]
    arrays = {
        "weights": np.array([[0.5, -1.0], [0.26, 3.0]], np.float32),
        "weight_scale": np.float32(0.25),
        "data_scale": np.float32(2.0),
        "zero": np.int8(0),
    }
    constants = [numpy_helper.from_array(np.array(values), name) for name, values in arrays.items()]
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, [None, 2])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [None, 2])
    graph = helper.make_graph(nodes, "g", [images], [logits], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


INPUTS = np.array([[3, 100], [250, 0]], np.uint8)


def _logits(model: onnx.ModelProto) -> np.ndarray:
    return graph_logits(model.SerializeToString(), [INPUTS], optimise=False)


def test_parameters_of_activations_by_tensor() -> None:
    found = activation_params(_graph())
    assert list(found) == ["float"]
    assert (float(found["float"].scale), found["float"].zero.dtype, int(found["float"].zero)) == (2.0, np.int8, 0)


def test_a_cast_behind_an_operator_in_fp32_is_not_the_tensor(trt: Path, lite0_onnx: Path) -> None:
    """In the FP16 graph the names are still those of the FP32 one."""
    float_graph = Graph(onnx.load(lite0_onnx))
    found = activation_params(onnx.load(trt))
    assert len(found) > 40
    assert all(float_graph.writer(name) is not None for name in found)


def test_without_pairs_nothing_is_rounded() -> None:
    bare = without_pairs(_graph())
    assert [node.op_type for node in bare.graph.node] == ["Cast", "Gemm"]
    assert [tensor.name for tensor in bare.graph.initializer] == ["weights"]
    weights = numpy_helper.to_array(bare.graph.initializer[0])
    np.testing.assert_allclose(_logits(bare), INPUTS.astype(np.float32) @ weights.T)
    assert not np.allclose(_logits(bare), _logits(_graph()))


def test_integer_weights_compute_the_same() -> None:
    stored = with_integer_weights(_graph())
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in stored.graph.initializer}["weights"]
    assert weights.dtype == np.int8
    assert weights.tolist() == [[2, -4], [1, 12]]
    np.testing.assert_array_equal(_logits(stored), _logits(_graph()))


def test_every_node_gets_a_zero_point_of_its_own() -> None:
    model = _graph()
    own = with_own_zeros(model)
    zeros = [node.input[2] for node in own.graph.node if len(node.input) > 2]
    assert len(zeros) == len(set(zeros)) == 4
    assert len({node.input[2] for node in model.graph.node if len(node.input) > 2}) == 1, "the argument was changed"
    np.testing.assert_array_equal(_logits(own), _logits(model))
