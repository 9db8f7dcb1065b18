"""ONNX Runtime: types of its quantised graph."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto

from edgefg.export.onnx.graph import Graph


def test_activations_are_uint8_and_weights_int8_by_channel(ort: Path) -> None:
    model = onnx.load(ort)
    onnx.checker.check_model(model, full_check=True)
    graph = Graph(model)
    kinds: dict[str, set[int]] = {"data": set(), "weights": set()}
    for node in graph.nodes:
        if node.op_type == "Conv":
            data, weights = (graph.writer(name) for name in node.input[:2])
            kinds["data"].add(graph.constants[data.input[2]].data_type)
            kinds["weights"].add(graph.constants[weights.input[2]].data_type)
            assert graph.array(weights.input[1]).size == graph.array(weights.input[0]).shape[0]
    assert kinds == {"data": {TensorProto.UINT8}, "weights": {TensorProto.INT8}}
    assert graph.writer_op("logits") == "Gemm"
    assert [node.op_type for node in graph.readers("images")] == ["Cast"]
