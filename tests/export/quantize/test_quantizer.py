"""Layers that stay in floating point, in the model files of every target."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import openvino
import pytest

from edgefg.errors import ExportError
from edgefg.export.onnx.check import check
from edgefg.export.onnx.graph import Graph
from edgefg.export.targets import TARGETS
from edgefg.export.tracing.onnx_exporter import write_onnx
from edgefg.preprocess import InputSpec, UInt8Array
from edgefg.training.models.network import Network
from tests.export.quantize.conftest import HURT
from tests.export.quantizing import quantizer_of


def _floating(model: Path, layers: Sequence[str]) -> set[str]:
    """Name those layers of a model file whose weights are not in 8 bits."""
    if model.suffix == ".onnx":
        graph = Graph(onnx.load(model))
        named = {node.name: node for node in graph.nodes}
        return {name for name in layers if graph.writer_op(named[name].input[1]) != "DequantizeLinear"}
    operations = {op.get_friendly_name(): op for op in openvino.Core().read_model(model).get_ops()}
    found = set()
    for name in layers:
        weights = operations.get(f"{name}/WithoutBiases", operations.get(name)).input_value(1).get_node()
        while weights.get_type_name() != "Constant":
            weights = weights.input_value(0).get_node()
        if weights.get_element_type() != openvino.Type.i8:
            found.add(name)
    return found


@pytest.mark.parametrize("to", list(TARGETS))
def test_what_is_kept_is_floating_point_and_nothing_else(
    spoilt: Path, inputs: UInt8Array, to: str, tmp_path: Path
) -> None:
    quantizer = quantizer_of(to, spoilt, inputs)
    assert len(quantizer.layers) == 5
    for keep in ([], [HURT], list(quantizer.layers[2:]), list(quantizer.layers)):
        model = quantizer.write(tmp_path, keep)
        assert _floating(model, quantizer.layers) == set(keep)
        if to == "tensorrt-onnx":
            assert check(model).broken == ()
    assert _floating(quantizer.write_single(tmp_path, HURT), quantizer.layers) == set(quantizer.layers) - {HURT}


@pytest.mark.slow
def test_tensorrts_rules_hold_whichever_layer_of_a_residual_block_is_kept(
    resnet: tuple[Network, InputSpec], tmp_path: Path
) -> None:
    write_onnx(*resnet, tmp_path / "fp32.onnx")
    inputs = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    quantizer = quantizer_of("tensorrt-onnx", tmp_path / "fp32.onnx", inputs)
    graph = Graph(onnx.load(tmp_path / "fp32.onnx"))
    branches = {
        graph.writer(name).name for node in graph.nodes if node.op_type == "Add" for name in node.input
        if graph.writer_op(name) == "Conv"
    }  # fmt: skip
    assert len(branches) > 5, "needed blocks whose skip is a convolution too"
    for keep in [*([name] for name in sorted(branches)), sorted(branches)[::2], list(quantizer.layers)]:
        assert check(quantizer.write(tmp_path, keep)).broken == (), keep


def test_layers_kept_by_request_stay_in_floating_point(spoilt: Path, inputs: UInt8Array, tmp_path: Path) -> None:
    quantizer = quantizer_of("onnx", spoilt, inputs, keep_layers=(HURT,))
    other = next(name for name in quantizer.layers if name != HURT)
    assert _floating(quantizer.write(tmp_path), quantizer.layers) == {HURT}
    assert _floating(quantizer.write(tmp_path, [other]), quantizer.layers) == {HURT, other}
    with pytest.raises(ExportError, match=r"no layer 'node_Conv_1000' .*`edgefg sensitivity` lists the layers"):
        quantizer_of("onnx", spoilt, inputs, keep_layers=("node_Conv_1000",)).write(tmp_path)
