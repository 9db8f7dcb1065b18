"""A network that rounds where its INT8 graph does: how it is built, loaded from its checkpoint, and exported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import numpy as np
import onnx
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import fx, nn

from edgefg.data.calibration import batches
from edgefg.errors import CheckpointError, DataError, ExportError
from edgefg.export.onnx.session import graph_logits
from edgefg.export.qat.fake_quantize import ActivationQuantizer, WeightQuantizer
from edgefg.export.quantize.pairs import QuantParams, with_own_zeros
from edgefg.export.targets import target_of
from edgefg.export.targets.target import Target
from edgefg.export.tracing.onnx_exporter import to_graph, torch_logits
from edgefg.export.tracing.trainable_graph import WEIGHTED, operator_of, origin_of, trace, value_of
from edgefg.log import get_logger
from edgefg.preprocess import InputSpec, UInt8Array
from edgefg.settings.quantization import QuantizationConfig, TargetName
from edgefg.training.checkpoint import Header, Quantized, blank, read_header
from edgefg.training.models.network import TrainableNetwork

_log = get_logger(__name__)
_AT = "quantizers"
_LIMIT = 127
_REDUCED_LIMIT = 64
PARITY = 0.02
"""Greatest mean deviation of a QDQ graph's logits from its network's, as a share of the greatest logit.

Both compute in floating point, but sum in another order; a value between two levels then goes to either, and the layers
behind it carry that on. Of EfficientNet-Lite0 with 81 classes, 48 photographs: 0.005, no class of which changes.
"""


class QuantizedNetwork(TrainableNetwork):
    """A classifier from ``uint8 [N, H, W, 3]`` RGB to ``float32 [N, classes]`` logits, through fake quantisers.

    Weights are rounded if the data of their convolution or matrix product are.

    Args:
        graph: a graph from `trace`; it is changed.
        activations: parameters of the quantised activations, by the name of their node.
        reduce_range: quantise weights to 7 bits.

    Raises:
        ExportError: the graph has no such node.
    """

    def __init__(
        self, graph: fx.GraphModule, activations: Mapping[str, QuantParams], *, reduce_range: bool = False
    ) -> None:
        super().__init__()
        self.traced = graph
        nodes = {node.name: node for node in graph.graph.nodes}
        if missing := sorted(activations.keys() - nodes.keys()):
            raise ExportError(
                f"{missing[0]} lies inside an operator of this network, where training cannot round it as the target"
                " does. Train for --to tensorrt-onnx or openvino, which round elsewhere."
            )
        for name, params in activations.items():
            _insert(graph, nodes[name], name, ActivationQuantizer(params))
        for node in nodes.values():
            if operator_of(node) in WEIGHTED and _is_quantized(origin_of(node.args[0])):
                self._quantize_weights(node.args[1], reduce_range)
        graph.recompile()

    def _quantize_weights(self, weights: fx.Node, reduce_range: bool) -> None:
        value = value_of(self.traced, weights)
        if value is not None:  # else computed, or shared and rounded already
            depthwise = value.ndim > 2 and value.shape[1] == 1  # no CPU sums its few products in pairs
            limit = _REDUCED_LIMIT if reduce_range and not depthwise else _LIMIT
            _insert(self.traced, weights, weights.name, WeightQuantizer(value, limit))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits of a batch."""
        return cast(torch.Tensor, self.traced(images))

    def freeze(self) -> QuantizedNetwork:
        """Keep the scales of the weights from now on, as an exporter needs; return the network itself."""
        self.eval()
        for module in self.modules():
            if isinstance(module, WeightQuantizer):
                module.freeze()
        return self


def _insert(graph: fx.GraphModule, node: fx.Node, name: str, quantizer: nn.Module) -> None:
    """Let everything that reads a node read it rounded."""
    graph.add_submodule(f"{_AT}.{name}", quantizer)
    with graph.graph.inserting_after(node):
        rounded = graph.graph.call_module(f"{_AT}.{name}", (node,))
    node.replace_all_uses_with(rounded, delete_user_cb=lambda reader: reader is not rounded)


def _is_quantized(node: fx.Node) -> bool:
    return node.op == "call_module" and str(node.target).startswith(f"{_AT}.")


def check_trained_for(
    path: Path, trained: Quantized, to: TargetName, precision: str, config: QuantizationConfig
) -> None:
    """Raise `ExportError` unless an export is the one that a quantised network was trained for."""
    reduce_range = trained.reduce_range if config.reduce_range is None else config.reduce_range
    if (to, precision, reduce_range) != (trained.to, "int8", trained.reduce_range):
        raise ExportError(
            f"{path} was trained for {_options(trained.to, 'int8', trained.reduce_range)}, not for"
            f" {_options(to, precision, config.reduce_range)}. Export it as trained, or run `edgefg qat` again."
        )


def _options(to: TargetName, precision: str, reduce_range: bool | None) -> str:
    bits = "" if reduce_range is None else " --reduce-range" if reduce_range else " --no-reduce-range"
    return f"--to {to} --precision {precision}{bits if target_of(to).runs_on_cpu else ''}"


def load_quantized(path: Path) -> tuple[QuantizedNetwork, Header]:
    """Rebuild a quantised network, frozen, and return it with its header.

    Raises:
        CheckpointError: the file cannot be used, or another version of torch gives the graph's tensors other names.
        DataError: it is the checkpoint of another stage.
    """
    header = read_header(path)
    if header.quantized is None:
        raise DataError(f"{path} is the checkpoint of a {header.kind}. Give one that `edgefg qat` wrote.")
    try:
        tensors = safetensors.torch.load_file(path)
        network = blank(header, {name.removeprefix("traced.network."): tensor for name, tensor in tensors.items()})
        traced = trace(network, header.input, fold_scale=target_of(header.quantized.to).folds_scale)
        quantized = QuantizedNetwork(traced.graph, _stored(tensors), reduce_range=header.quantized.reduce_range)
        quantized.load_state_dict(tensors)
    except (RuntimeError, AttributeError, ExportError, SafetensorError) as exc:
        raise CheckpointError(
            f"{path} does not fit the {header.backbone} that its header describes, as torch {torch.__version__} traces"
            f" it; it was trained with torch {header.quantized.torch}: {exc}"
        ) from exc
    return quantized.freeze(), header


def _stored(tensors: Mapping[str, torch.Tensor]) -> dict[str, QuantParams]:
    """Return the parameters of the quantised activations that a state dict holds."""
    zeros = [name for name in tensors if name.startswith(f"traced.{_AT}.") and name.endswith(".zero")]
    return {
        name.split(".")[2]: QuantParams(
            tensors[f"{name.removesuffix('zero')}scale"].numpy(), tensors[name].numpy()
        )
        for name in zeros
    }  # fmt: skip


def write_quantized(
    network: QuantizedNetwork, spec: InputSpec, target: Target, folder: Path, inputs: UInt8Array, *, batch: int = 1
) -> Path:
    """Write the INT8 model file of a target into ``folder``, with the trained quantisers; return its path.

    The exporter writes every fake quantiser as a QuantizeLinear and a DequantizeLinear, so one QDQ graph serves all
    targets. Nothing is calibrated.

    Args:
        network: frozen; trained for this target.
        spec: the network's input.
        target: the target.
        folder: where to write.
        inputs: ``uint8 [K, height, width, 3]`` RGB, to compare the graph with the network, and FP16 with FP32.
        batch: fixed batch size; 0 leaves it free.

    Raises:
        ExportError: the exporter or the target's converter failed, or the graph gives other logits than the network.
    """
    _log.info("exporting the trained quantisers to ONNX")
    model = with_own_zeros(to_graph(network, spec, batch=batch))
    check_quantized_parity(network, model, inputs, batch)
    return target.emit_qdq(model, folder, inputs, batch=batch)


def check_quantized_parity(
    network: QuantizedNetwork, model: onnx.ModelProto, inputs: UInt8Array, batch: int = 1
) -> float:
    """Compare a QDQ graph in ONNX Runtime with its network; return the mean deviation of a logit.

    ONNX Runtime runs the graph unchanged, in floating point: its 8-bit kernels would add deviations of their own.

    Raises:
        ExportError: the deviation exceeds `PARITY` times the greatest logit.
    """
    found = graph_logits(model.SerializeToString(), batches(inputs, batch or len(inputs)), optimise=False)
    expected = torch_logits(network, inputs)
    deviation = float(np.abs(found[: len(inputs)] - expected).mean())
    allowed = PARITY * float(np.abs(expected).max())
    if not deviation <= allowed:  # a NaN fails
        raise ExportError(
            f"the QDQ graph deviates from the quantised network by {deviation:.3g} on average, more than the allowed"
            f" {allowed:.3g}: the exporter changed the arithmetic. Try another version of torch."
        )
    return deviation
