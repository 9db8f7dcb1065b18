"""Look-ups over an ONNX graph. No torch."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy.typing as npt
import onnx
from onnx import numpy_helper


class Graph:
    """Look-ups over an ONNX graph: who writes a tensor, who reads it, which are constants."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
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
        return self._readers[tensor]

    def writer_op(self, tensor: str) -> str:
        """Return the op type of the node that writes a tensor; empty for constants and inputs."""
        node = self.writer(tensor)
        return node.op_type if node is not None else ""

    def reader_ops(self, node: onnx.NodeProto) -> list[str]:
        """Return the op types that read a node's first output."""
        return [reader.op_type for reader in self.readers(node.output[0])]

    def array(self, tensor: str) -> npt.NDArray[Any]:
        """Return a constant's values."""
        return numpy_helper.to_array(self.constants[tensor])
