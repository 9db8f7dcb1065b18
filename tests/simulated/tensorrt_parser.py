"""Simulated TensorRT: the network, and OnnxParser with what the real one is known to refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.simulated.tensorrt_core import DataType, Dims, TensorLocation, Voice
from tests.simulated.tensorrt_engine import Site
from tests.simulated.tensorrt_names import ErrorCode

_TYPES = {1: "FLOAT", 2: "UINT8", 3: "INT8", 6: "INT32", 7: "INT64", 9: "BOOL", 10: "HALF", 16: "BF16", 17: "FP8"}
_HALF, _UINT8, _INT32, _DOUBLE = 10, 2, 6, 11


class ITensor:
    """An input or output of a network."""

    def __init__(self, value: Any, *, is_input: bool) -> None:
        kind = value.type.tensor_type
        self.name = value.name
        self.shape = Dims(d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim)
        self.dtype = getattr(DataType, _TYPES.get(kind.elem_type, "FLOAT"))
        self.location = TensorLocation.DEVICE
        self.is_network_input, self.is_network_output, self.is_shape_tensor = is_input, not is_input, False


class INetworkDefinition:
    """What the parser fills and the builder reads."""

    __slots__ = ("__weakref__", "_flags", "_inputs", "_onnx", "_outputs", "_parsed", "_site", "_traits", "name")
    _flags: Any
    _inputs: list[ITensor]
    _onnx: Any
    _outputs: list[ITensor]
    _parsed: Any
    _site: Any
    _traits: set[str]
    name: Any

    def __init__(self) -> None:
        raise TypeError("tensorrt.INetworkDefinition: No constructor defined!")

    @classmethod
    def _make(cls, site: Site, flags: int) -> INetworkDefinition:
        self = object.__new__(cls)
        self._site, self._flags, self.name = site, flags, "Simulated network"
        self._inputs = []
        self._outputs = []
        self._onnx, self._parsed = b"", False
        self._traits = set()
        return self

    flags = property(lambda self: self._flags)
    num_inputs = property(lambda self: len(self._inputs))
    num_outputs = property(lambda self: len(self._outputs))
    num_layers = property(lambda self: int(bool(self._onnx)))

    def get_flag(self, flag: Any) -> bool:
        return bool(self._flags >> int(flag) & 1)

    def get_input(self, index: int) -> ITensor | None:
        return self._inputs[index] if 0 <= index < len(self._inputs) else None

    def get_output(self, index: int) -> ITensor | None:
        return self._outputs[index] if 0 <= index < len(self._outputs) else None


class Refusal(NamedTuple):
    """Why a node is not parsed."""

    node: int
    text: str
    code: Any = ErrorCode.UNSUPPORTED_NODE


class ParserError:
    """One error of a parser."""

    def __init__(self, code: Any, text: str, index: int, name: str, operator: str) -> None:
        self._code, self._text, self._index, self._name, self._operator = code, text, index, name, operator

    def code(self) -> Any:
        return self._code

    def desc(self) -> str:
        return self._text

    def file(self) -> str:
        return "simulated/onnxOpImporters.cpp"

    def func(self) -> str:
        return f"import{self._operator}"

    def line(self) -> int:
        return 1

    def node(self) -> int:
        return self._index

    def node_name(self) -> str:
        return self._name

    def node_operator(self) -> str:
        return self._operator

    def local_function_stack(self) -> list[str]:
        return []

    def local_function_stack_size(self) -> int:
        return 0

    def __repr__(self) -> str:
        return f"In node {self._index} with name: {self._name} and operator: {self._operator}: {self._text}"


class OnnxParser:
    """Fills a network from ONNX."""

    site: Site
    __slots__ = ("__weakref__", "_errors", "_network", "_voice")

    def __init__(self, network: INetworkDefinition, logger: Any) -> None:
        if not isinstance(network, INetworkDefinition):
            raise TypeError(f"__init__(): incompatible constructor arguments: needed a network, got {network!r}")
        self._network, self._voice = network, Voice(self.site.books, logger)
        self._errors: list[ParserError] = []

    num_errors = property(lambda self: len(self._errors))

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]

    def clear_errors(self) -> None:
        self._errors.clear()

    def parse_from_file(self, model: str) -> bool:
        return self.parse(Path(model).read_bytes())

    def parse(self, model: Any, path: str | None = None) -> bool:
        import onnx

        data = bytes(memoryview(model).cast("B"))
        try:
            graph = onnx.load_from_string(data).graph
            if not graph.node:
                raise ValueError("no node")
        except Exception:
            self._add(ErrorCode.MODEL_DESERIALIZE_FAILED, "Failed to parse the ONNX model.", 0, "", "")
            return False
        for refusal in refusals(graph):
            node = graph.node[refusal.node]
            self._add(refusal.code, refusal.text, refusal.node, node.name, node.op_type)
        if text := self._network._site.books.config.parser_error:
            self._add(ErrorCode.UNSUPPORTED_NODE, text, 0, "node_1", "Conv")
        self._network._parsed = not self._errors
        if self._errors:
            return False
        constants = {tensor.name for tensor in graph.initializer}
        self._network._inputs = [ITensor(v, is_input=True) for v in graph.input if v.name not in constants]
        self._network._outputs = [ITensor(v, is_input=False) for v in graph.output]
        self._network._onnx, self._network._traits = data, traits(graph)
        return True

    def _add(self, code: Any, text: str, index: int, name: str, operator: str) -> None:
        error = ParserError(code, text, index, name, operator)
        self._errors.append(error)
        self._voice.error(repr(error))


def traits(graph: Any) -> set[str]:
    """Return what a graph holds: its operators, and ``float16`` where anything is of that type."""
    found = {node.op_type for node in graph.node}
    kinds = {tensor.data_type for tensor in graph.initializer}
    kinds |= {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output, *graph.value_info)}
    kinds |= {attribute.i for node in graph.node if node.op_type == "Cast" for attribute in node.attribute}
    return found | ({"float16"} if _HALF in kinds else set())


def refusals(graph: Any) -> Iterator[Refusal]:
    """Find what TensorRT refuses or what this project knows to break (shared/tensorrt.md)."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:  # a constant may also be a node
        if node.op_type == "Constant":
            constants.update((node.output[0], a.t) for a in node.attribute if a.name == "value")
    narrow = {v.name for v in graph.input if v.type.tensor_type.elem_type == _UINT8}
    for index, node in enumerate(graph.node):
        if narrow & set(node.input) and node.op_type != "Cast":
            yield Refusal(index, "UINT8 network input must feed a Cast", ErrorCode.UNSUPPORTED_NODE_DATATYPE)
        check = _CHECKS.get(node.op_type)
        if check is not None and (text := check(node, constants)):
            yield Refusal(index, text)


def _check_quantisation(node: Any, constants: dict[str, Any]) -> str:
    import numpy as np
    from onnx import numpy_helper

    data = constants.get(node.input[0])
    if node.op_type == "DequantizeLinear" and data is not None and data.data_type == _INT32:
        return "DequantizeLinear of an int32 constant (a quantised bias) is not supported"
    if len(node.input) < 3 or not node.input[2]:
        return "" if node.op_type == "DequantizeLinear" else "QuantizeLinear without zero point means uint8"
    zero, scale = (constants.get(name) for name in (node.input[2], node.input[1]))
    if zero is None or scale is None:
        return "scale and zero point must be constants"
    if zero.data_type == _UINT8:
        return "UINT8 quantisation is not supported: only int8, symmetric"
    if np.any(numpy_helper.to_array(zero) != 0):
        return "Assertion failed: shiftIsAllZeros: TRT only supports symmetric quantization, all zero points zero"
    return "" if np.all(numpy_helper.to_array(scale) > 0) else "Scale coefficients must all be positive"


def _check_resize(node: Any, constants: dict[str, Any]) -> str:
    return "antialias is not supported" if any(a.name == "antialias" and a.i for a in node.attribute) else ""


_CHECKS: dict[str, Callable[[Any, dict[str, Any]], str]] = {
    "QuantizeLinear": _check_quantisation,
    "DequantizeLinear": _check_quantisation,
    "Resize": _check_resize,
}
