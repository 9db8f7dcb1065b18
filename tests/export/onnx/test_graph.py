"""Look-ups over ONNX graphs."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper

from edgefg.export.onnx.graph import Graph, bound_types, name_of
from tests.export.onnx.small import model_of, node

PAIR = [
    node("QuantizeLinear", "images scale zero", "q"),
    node("DequantizeLinear", "q scale zero", "dq"),
    node("Relu", "dq", "a"),
    node("Sigmoid", "dq", "b"),
    node("Add", "a b", "logits"),
]
SCALES = {"scale": np.float32(0.5), "zero": np.int8(0)}


def test_writers_and_readers() -> None:
    graph = Graph(model_of(PAIR, SCALES))
    assert graph.opset == 19
    assert (set(graph.inputs), graph.outputs, set(graph.constants)) == ({"images"}, {"logits"}, {"scale", "zero"})
    assert (graph.writer("images"), graph.writer("scale"), graph.writer_op("scale")) == (None, None, "")
    assert graph.writer_op("dq") == "DequantizeLinear"
    assert [reader.op_type for reader in graph.readers("dq")] == ["Relu", "Sigmoid"]
    assert graph.reader_ops(PAIR[0]) == ["DequantizeLinear"]
    assert graph.readers("logits") == []
    assert graph.array("scale") == 0.5


def test_what_stands_before_a_pair() -> None:
    graph = Graph(model_of(PAIR, SCALES))
    assert graph.before_pair("dq") == "images"
    assert graph.before_pair("q") == "images"
    assert graph.before_pair("a") == "a"


def test_a_constant_node_is_a_constant() -> None:
    value = helper.make_tensor("v", TensorProto.FLOAT, [2], [1.0, 2.0])
    graph = Graph(
        model_of([helper.make_node("Constant", [], ["two"], value=value), node("Mul", "images two", "logits")])
    )
    assert [found.op_type for found in graph.nodes] == ["Mul"]
    assert graph.array("two").tolist() == [1.0, 2.0]


def test_a_node_without_a_name() -> None:
    assert name_of(helper.make_node("Relu", ["a"], ["b"])) == "Relu → b"
    assert name_of(node("Relu", "a", "b")) == "b"


def test_types_pass_from_node_to_node() -> None:
    nodes = [
        node("Cast", "images", "half", to=TensorProto.FLOAT16),
        node("Relu", "half", "still_half"),
        node("Add", "still_half single", "logits"),
    ]
    bound = {found.op_type: kinds for found, kinds in bound_types(Graph(model_of(nodes, {"single": np.float32(1)})))}
    assert bound["Relu"] == {"T": {TensorProto.FLOAT16}}
    assert bound["Add"] == {"T": {TensorProto.FLOAT16, TensorProto.FLOAT}}, "ONNX allows one"


def test_operators_that_onnx_does_not_define_are_left_out() -> None:
    nodes = [helper.make_node("Magic", ["images"], ["logits"], domain="com.example")]
    assert list(bound_types(Graph(model_of(nodes)))) == []
