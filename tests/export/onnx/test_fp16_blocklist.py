"""Nodes that stay in FP32."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import NodeProto

from edgefg.export.onnx.fp16_blocklist import fp16_blocklist, fp32_tensors
from edgefg.export.onnx.graph import Graph
from tests.export.onnx.small import model_of, node


@pytest.mark.parametrize(
    ("nodes", "constants", "kept"),
    [
        ([node("Relu", "images", "logits")], {}, set()),
        ([node("Exp", "images", "logits")], {}, {"logits"}),
        ([node("Div", "images two", "logits")], {"two": np.float32(2)}, set()),
        ([node("Abs", "images", "a"), node("Div", "images a", "logits")], {}, {"logits"}),
        ([node("MatMul", "images w", "logits")], {"w": np.ones((4, 4), np.float32)}, set()),
        ([node("MatMul", "images images", "logits")], {}, {"logits"}),
        ([node("Add", "images tiny", "logits")], {"tiny": np.float32(1e-9)}, {"logits"}),
        ([node("Add", "images mixed", "logits")], {"mixed": np.array([1e-9, 1], np.float32)}, set()),
    ],
)
def test_what_is_steep_or_reads_a_tiny_constant(
    nodes: list[NodeProto], constants: dict[str, object], kept: set[str]
) -> None:
    assert fp16_blocklist(Graph(model_of(nodes, constants)), means=True) == kept


def test_means_only_if_asked_for_unless_steep_nodes_read_them() -> None:
    pooled = [node("GlobalAveragePool", "images", "pool"), node("Flatten", "pool", "logits")]
    assert fp16_blocklist(Graph(model_of(pooled)), means=True) == {"pool"}
    assert fp16_blocklist(Graph(model_of(pooled)), means=False) == set()
    steep = [node("GlobalAveragePool", "images", "pool"), node("Sqrt", "pool", "logits")]
    assert fp16_blocklist(Graph(model_of(steep)), means=False) == {"pool", "logits"}


def test_a_cheap_node_between_two_steep_ones_stays_too() -> None:
    nodes = [node("Exp", "images", "e"), node("Neg", "e", "n"), node("Log", "n", "logits")]
    graph = Graph(model_of(nodes))
    kept = fp16_blocklist(graph, means=False)
    assert kept == {"e", "n", "logits"}
    assert fp32_tensors(graph, kept) == {"e", "n"}
    shared = Graph(model_of([*nodes, node("Relu", "n", "other")]))
    assert fp16_blocklist(shared, means=False) == {"e", "logits"}
    assert fp32_tensors(shared, {"e", "logits"}) == set()
