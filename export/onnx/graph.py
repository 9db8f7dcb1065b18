"""Look-ups over an ONNX graph. No torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy.typing as npt
import onnx
from onnx import numpy_helper


def name_of(node: onnx.NodeProto) -> str:
    """Return a node's name or, since ONNX lets it have none, its operator and its first output."""
    return node.name or f"{node.op_type} → {node.output[0]}"


class Graph:
    """Look-ups over an ONNX graph: producers, consumers and constants of tensors.

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
        """Return the tensor in front of the Q/DQ pair that writes ``tensor``, or ``tensor`` if there is no pair."""
        for op_type in ("DequantizeLinear", "QuantizeLinear"):
            node = self.writer(tensor)
            if node is not None and node.op_type == op_type:
                tensor = node.input[0]
        return tensor

    def array(self, tensor: str) -> npt.NDArray[Any]:
        """Return a constant's values."""
        return numpy_helper.to_array(self.constants[tensor])


def bound_types(graph: Graph) -> Iterator[tuple[onnx.NodeProto, dict[str, set[int]]]]:
    """Yield each node with the element types that its inputs give the type variables of its operator; ONNX allows one.

    Types come from constants, network inputs and casts, and pass from node to node by the operators' schemas. Tensors
    whose type is not known that way are left out, and so are operators that ONNX does not define.
    """
    types = {name: tensor.data_type for name, tensor in graph.constants.items()}
    types |= {name: value.type.tensor_type.elem_type for name, value in graph.inputs.items()}
    for node in graph.nodes:
        bound: dict[str, set[int]] = defaultdict(set)
        try:
            schema = onnx.defs.get_schema(node.op_type, graph.opset, node.domain)
        except onnx.defs.SchemaError:
            continue
        for i, name in enumerate(node.input):
            formal = schema.inputs[min(i, len(schema.inputs) - 1)]  # the last one may be variadic
            if types.get(name) and formal.is_homogeneous:
                bound[formal.type_str].add(types[name])
        yield node, bound
        for i, name in enumerate(node.output):
            found = bound.get(schema.outputs[min(i, len(schema.outputs) - 1)].type_str, set())
            if name and len(found) == 1:
                (types[name],) = found
        if node.op_type == "Cast":
            types[node.output[0]] = next(attribute.i for attribute in node.attribute if attribute.name == "to")
