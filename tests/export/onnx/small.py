"""Small ONNX graphs for the tests of this folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper


def model_of(
    nodes: Sequence[NodeProto],
    constants: dict[str, object] | None = None,
    *,
    kind: int = TensorProto.FLOAT,
    shape: Sequence[int] = (1, 3, 4, 4),
) -> onnx.ModelProto:
    """A graph from ``images``, [1, 3, 4, 4], to ``logits`` of a shape; constants by name."""
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()]
    images = helper.make_tensor_value_info("images", kind, [1, 3, 4, 4])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)
    graph = helper.make_graph(nodes, "g", [images], [logits], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)


def node(kind: str, inputs: str, output: str, **attributes: Any) -> NodeProto:
    return helper.make_node(kind, inputs.split(), [output], output, **attributes)
