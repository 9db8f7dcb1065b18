"""Quantised network → the INT8 model file of its target, from the quantisers that it was trained with.

The exporter writes every fake quantiser as a QuantizeLinear and a DequantizeLinear, so one QDQ graph serves all
targets. Nothing is calibrated.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from edgefg.data.calibration import batches
from edgefg.errors import ExportError
from edgefg.export.onnx.graph import Graph
from edgefg.export.qat.quantized_network import QuantizedNetwork
from edgefg.export.quantize.qdq import finish_tensorrt, graph_logits
from edgefg.export.targets.emit import emit, model_name
from edgefg.export.tracing.onnx_exporter import to_graph, torch_logits
from edgefg.preprocess import InputSpec, UInt8Array
from edgefg.training.checkpoint import Target

_PAIR = ("QuantizeLinear", "DequantizeLinear")
PARITY = 0.02
"""Greatest mean deviation of a QDQ graph's logits from its network's, as a share of the greatest logit.

Both compute in floating point, but sum in another order; a value between two levels then goes to either, and the layers
behind it carry that on. Of EfficientNet-Lite0 with 81 classes, 48 photographs: 0.005, no class of which changes.
"""


def write_quantized(
    network: QuantizedNetwork,
    spec: InputSpec,
    to: Target,
    folder: Path,
    inputs: UInt8Array,
    *,
    batch: int = 1,
    say: Callable[[str], None],
) -> Path:
    """Write the INT8 model file of a target into ``folder``; return its path.

    Args:
        network: frozen; trained for this target.
        spec: what it takes.
        to: the target.
        folder: where to write.
        inputs: ``uint8 [K, height, width, 3]`` RGB, to compare the graph with the network, and FP16 with FP32.
        batch: fixed batch size; 0 leaves it free.
        say: called with one line before each step.

    Raises:
        ExportError: the exporter or the target's converter failed, or the graph gives other logits than the network.
    """
    say("exporting the trained quantisers to ONNX")
    model = with_own_zeros(to_graph(network, spec, batch=batch)[0])
    check_quantized_parity(network, model, inputs, batch)
    if to == "tensorrt-onnx":
        target = folder / model_name(to)
        with tempfile.TemporaryDirectory(prefix="edgefg-") as scratch:
            source = Path(scratch) / "float.onnx"
            source.write_bytes(without_pairs(model).SerializeToString())
            target.write_bytes(model.SerializeToString())
            why_not = finish_tensorrt(source, target, inputs, batch=batch)
        say(f"what stays floating point is {f'FP32: {why_not}' if why_not else 'FP16'}")
        return target
    if to == "openvino":
        say("converting to OpenVINO")
    with tempfile.TemporaryDirectory(prefix="edgefg-") as scratch:
        source = Path(scratch) / "qdq.onnx"
        source.write_bytes(with_integer_weights(model).SerializeToString())
        return emit(source, to, folder)


def check_quantized_parity(
    network: QuantizedNetwork, model: onnx.ModelProto, inputs: UInt8Array, batch: int = 1
) -> float:
    """Compare a QDQ graph in ONNX Runtime with its network; return the mean deviation of a logit.

    ONNX Runtime leaves the graph as it is, in floating point: its 8-bit kernels would add deviations of their own.

    Raises:
        ExportError: it exceeds `PARITY` times the greatest logit.
    """
    found, expected = (
        graph_logits(model.SerializeToString(), batches(inputs, batch or len(inputs)), optimise=False),
        torch_logits(network, inputs),
    )
    deviation = float(np.abs(found[: len(inputs)] - expected).mean())
    allowed = PARITY * float(np.abs(expected).max())
    if not deviation <= allowed:  # a NaN fails
        raise ExportError(
            f"the QDQ graph deviates from the quantised network by {deviation:.3g} on average, allowed are"
            f" {allowed:.3g}; the exporter changed the arithmetic: try another version of torch"
        )
    return deviation


def with_own_zeros(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a QDQ graph in which no two nodes share the constant of a zero point.

    ONNX Runtime 1.32 cannot open shared ones with `edgefg.runtime.EXACT_SUMS` on a CPU that needs it.
    """
    own = onnx.ModelProto()
    own.CopyFrom(model)
    constants = {tensor.name: tensor for tensor in own.graph.initializer}
    seen = set()
    for node in own.graph.node:
        if node.op_type in _PAIR and len(node.input) > 2:
            name = node.input[2]
            if name in seen:
                node.input[2] = f"{name}.{node.name}"
                own.graph.initializer.add().CopyFrom(constants[name])
                own.graph.initializer[-1].name = node.input[2]
            seen.add(name)
    return own


def without_pairs(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a QDQ graph as it would be without its pairs, in floating point."""
    graph = Graph(model)
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    kept = [node for node in bare.graph.node if node.op_type not in _PAIR]
    for node in kept:
        node.input[:] = [graph.before_pair(name) for name in node.input]
    _keep(bare, kept)
    return bare


def with_integer_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a QDQ graph whose constants are stored as int8 before their DequantizeLinear, a quarter as large."""
    graph = Graph(model)
    stored = onnx.ModelProto()
    stored.CopyFrom(model)
    constants = {tensor.name: tensor for tensor in stored.graph.initializer}
    rounded = [node for node in graph.nodes if node.op_type == "QuantizeLinear" and node.input[0] in constants]
    for node in rounded:
        weights, scale = (graph.array(name) for name in node.input[:2])
        steps = np.rint(weights / scale.reshape(-1, *[1] * (weights.ndim - 1)))
        constants[node.input[0]].CopyFrom(
            numpy_helper.from_array(np.clip(steps, -128, 127).astype(np.int8), node.input[0])
        )
    sources = {node.output[0]: node.input[0] for node in rounded}
    kept = [node for node in stored.graph.node if node.output[0] not in sources]
    for node in kept:
        node.input[:] = [sources.get(name, name) for name in node.input]
    _keep(stored, kept)
    return stored


def _keep(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> None:
    """Drop all other nodes, and the constants that nothing reads any more."""
    read = {name for node in nodes for name in node.input}
    constants = [tensor for tensor in model.graph.initializer if tensor.name in read]
    # Copied before the originals go.
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    constants = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in constants]
    del model.graph.node[:]
    del model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(constants)
