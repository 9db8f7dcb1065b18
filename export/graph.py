"""Look-ups over an ONNX graph. No torch."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy.typing as npt
import onnx
from onnx import numpy_helper


class Graph:
    """Look-ups over an ONNX graph: who writes a tensor, who reads it, which are constants.

    A Constant node counts as a constant, not as a node.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        standard = (int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
        self.opset = next(standard, 0)
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.nodes: list[onnx.NodeProto] = []
        for node in model.graph.node:
            values = [attribute.t for attribute in node.attribute if attribute.name == "value"]
            if node.op_type == "Constant" and values:
                self.constants[node.output[0]] = values[0]
            else:
                self.nodes.append(node)
        self.inputs = {value.name: value for value in model.graph.input if value.name not in self.constants}
        self.outputs = {value.name for value in model.graph.output}
        self._writers = {name: node for node in self.nodes for name in node.output}
        self._readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                self._readers[name].append(node)

    def writer(self, tensor: str) -> onnx.NodeProto | None:
        """Return the node that writes a tensor; None for constants and inputs."""
        return self._writers.get(tensor)

    def readers(self, tensor: str) -> list[onnx.NodeProto]:
        """Return the nodes that read a tensor."""
        return self._readers.get(tensor, [])

    def writer_op(self, tensor: str) -> str:
        """Return the op type of the node that writes a tensor; empty for constants and inputs."""
        node = self.writer(tensor)
        return node.op_type if node is not None else ""

    def reader_ops(self, node: onnx.NodeProto) -> list[str]:
        """Return the op types that read a node's first output."""
        return [reader.op_type for reader in self.readers(node.output[0])]

    def before_pair(self, tensor: str) -> str:
        """Return the name of the tensor that a Q/DQ pair quantises and hands over as ``tensor``; else ``tensor``."""
        for op_type in ("DequantizeLinear", "QuantizeLinear"):
            node = self.writer(tensor)
            if node is not None and node.op_type == op_type:
                tensor = node.input[0]
        return tensor

    def array(self, tensor: str) -> npt.NDArray[Any]:
        """Return a constant's values."""
        return numpy_helper.to_array(self.constants[tensor])
