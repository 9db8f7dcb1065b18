"""ONNX Runtime sums 8-bit products exactly on every CPU, and opens what it cannot sum exactly too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgefg.runtime import load

SIDE, CHANNELS = 8, 16


def quantised(path: Path, *, shared_zero: bool) -> Path:
    """Write two INT8 convolutions of the greatest levels and weights: (1, 8, 8, 3) → 16 logits of about 1."""
    weights = [np.full((CHANNELS, 3, 3, 3), 127, np.int8), np.full((CHANNELS, CHANNELS, 1, 1), 127, np.int8)]
    scales = {"level": 1 / 255, "weight0": 1 / (127 * 27), "weight1": 1 / (127 * CHANNELS)}
    constants = [numpy_helper.from_array(np.float32(value), name) for name, value in scales.items()]
    constants.append(numpy_helper.from_array(np.uint8(0), "level_zero"))
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["float", "level"], ["pixels"]),
        helper.make_node("Transpose", ["pixels"], ["planes0"], perm=[0, 3, 1, 2]),
    ]
    for i, values in enumerate(weights):
        zero = "zero" if shared_zero else f"zero{i}"
        if zero not in [constant.name for constant in constants]:
            constants.append(numpy_helper.from_array(np.int8(0), zero))
        constants.append(numpy_helper.from_array(values, f"w{i}"))
        nodes += [
            helper.make_node("QuantizeLinear", [f"planes{i}", "level", "level_zero"], [f"q{i}"]),
            helper.make_node("DequantizeLinear", [f"q{i}", "level", "level_zero"], [f"d{i}"]),
            helper.make_node("DequantizeLinear", [f"w{i}", f"weight{i}", zero], [f"dw{i}"]),
            helper.make_node("Conv", [f"d{i}", f"dw{i}"], [f"planes{i + 1}"]),
        ]
    nodes += [
        helper.make_node("QuantizeLinear", ["planes2", "level", "level_zero"], ["q2"]),
        helper.make_node("DequantizeLinear", ["q2", "level", "level_zero"], ["d2"]),
        helper.make_node("GlobalAveragePool", ["d2"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "sums",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, [1, SIDE, SIDE, 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, CHANNELS])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("level", [64, 255])
def test_sums_of_8_bit_products_do_not_saturate(level: int, tmp_path: Path) -> None:
    runtime = load(quantised(tmp_path / "m.onnx", shared_zero=False), threads=1)
    found = runtime.infer(np.full((1, SIDE, SIDE, 3), level, np.uint8))
    runtime.close()
    np.testing.assert_allclose(found, level / 255, atol=1 / 255)


def test_a_graph_whose_nodes_share_a_zero_point_opens(tmp_path: Path) -> None:
    runtime = load(quantised(tmp_path / "m.onnx", shared_zero=True), threads=1)
    assert runtime.infer(np.full((1, SIDE, SIDE, 3), 32, np.uint8)).shape == (1, CHANNELS)
    runtime.close()
