"""Bias correction: the shift that quantisation causes in a layer's mean output is subtracted from its bias.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.2 and appendix D:
the empirical correction, layer by layer, each measured with the layers before it corrected. The FP32 graph is
corrected and then quantised again, so that the correction works for float and for int32 biases.

NNCF has a correction of its own, so OpenVINO's models are not corrected here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from edgefg.errors import ExportError, one_line
from edgefg.export.onnx.graph import Graph
from edgefg.export.onnx.rules import INPUT
from edgefg.export.onnx.session import open_session
from edgefg.preprocess import UInt8Array
from edgefg.progress import track

Quantise = Callable[[onnx.ModelProto], onnx.ModelProto]
"""FP32 graph → QDQ graph of the same layers by the same names, with float biases."""
_Floats = npt.NDArray[np.float32]
_MEAN = "edgefg_mean_of_"


def correct_biases(model: onnx.ModelProto, quantise: Quantise, data: Sequence[UInt8Array]) -> onnx.ModelProto:
    """Return an FP32 graph whose quantised form gives each layer the mean output that it has in FP32.

    Args:
        model: FP32, of ``uint8 [batch, height, width, 3]``, opset 18 or later; not changed. The Conv and Gemm nodes
            with constant weights are corrected.
        quantise: quantises it, with the final ranges.
        data: batches of images to take the means over. All of them run once more for each layer.

    Raises:
        ExportError: ONNX Runtime cannot run the graphs.
    """
    own, layers = _with_own_biases(model)
    constants = Graph(own)
    biases = {node.input[2]: constants.array(node.input[2]) for node in layers}
    try:
        expected = _Means(own, layers, {}).run(data, {})
        measured = _Means(quantise(own), layers, biases)
        for node in track(layers, "correcting biases"):
            shift = measured.run(data, biases)[node.name] - expected[node.name]
            biases[node.input[2]] = (biases[node.input[2]] - shift).astype(np.float32)
    except ExportError:
        raise
    except Exception as exc:  # ONNX Runtime raises a family of its own, plain RuntimeError among them
        raise ExportError(f"the biases could not be corrected: {one_line(exc)[:300]}") from exc
    for tensor in own.graph.initializer:
        if tensor.name in biases:
            tensor.CopyFrom(numpy_helper.from_array(biases[tensor.name], tensor.name))
    return own


def _channels(graph: Graph, node: onnx.NodeProto) -> int:
    """Return how many output channels a node has; 0 if it is not a layer with constant weights and bias."""
    if node.op_type not in ("Conv", "Gemm") or node.input[1] not in graph.constants:
        return 0
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    dims = graph.constants[node.input[1]].dims
    channels = int(dims[0] if node.op_type == "Conv" or attributes.get("transB") else dims[1])
    bias = next(iter(node.input[2:]), "")
    plain = not bias or (bias in graph.constants and list(graph.constants[bias].dims) == [channels])
    return channels if plain and attributes.get("beta", 1.0) == 1.0 else 0


def _with_own_biases(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[onnx.NodeProto]]:
    """Copy a graph and give each layer a bias of its own, zeros if it had none; return the copy and the layers."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = Graph(copy)
    layers = [node for node in graph.nodes if _channels(graph, node)]
    for node in layers:
        values = graph.array(node.input[2]) if node.input[2:] else np.zeros(_channels(graph, node), np.float32)
        name = f"{node.name}_own_bias"
        copy.graph.initializer.append(numpy_helper.from_array(np.array(values, np.float32), name))
        del node.input[2:]
        node.input.append(name)
    read = {name for node in copy.graph.node for name in node.input}
    for tensor in [tensor for tensor in copy.graph.initializer if tensor.name not in read]:
        copy.graph.initializer.remove(tensor)
    return copy, layers


class _Means:
    """Runs a graph for the mean output of each channel of its layers, over images and positions."""

    def __init__(self, model: onnx.ModelProto, layers: Sequence[onnx.NodeProto], biases: Mapping[str, _Floats]) -> None:
        probed = onnx.ModelProto()
        probed.CopyFrom(model)
        graph = probed.graph
        nodes = {node.name: node for node in graph.node}
        for layer in layers:
            axes = np.array([0, 2, 3] if layer.op_type == "Conv" else [0], np.int64)
            name = f"{_MEAN}{layer.name}"
            graph.initializer.append(numpy_helper.from_array(axes, f"{name}_axes"))
            source = nodes[layer.name].output[0]
            graph.node.append(helper.make_node("ReduceMean", [source, f"{name}_axes"], [name], keepdims=0))
            graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None]))
        # A constant that is an input as well may be replaced in every run.
        for bias, values in biases.items():
            graph.input.append(helper.make_tensor_value_info(bias, onnx.TensorProto.FLOAT, values.shape))
        self._session = open_session(probed.SerializeToString())
        self._layers = [layer.name for layer in layers]

    def run(self, data: Sequence[UInt8Array], biases: Mapping[str, _Floats]) -> dict[str, npt.NDArray[np.float64]]:
        """Return the means by the layers' names."""
        wanted = [f"{_MEAN}{name}" for name in self._layers]
        totals: Any = [0.0] * len(wanted)
        for batch in data:
            found = self._session.run(wanted, {INPUT: batch, **biases})
            totals = [total + row.astype(np.float64) for total, row in zip(totals, found, strict=True)]
        return {name: total / len(data) for name, total in zip(self._layers, totals, strict=True)}
