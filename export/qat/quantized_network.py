"""A network that rounds where its INT8 graph does, for training and for export; and its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import fx, nn

from edgefg.errors import CheckpointError, DataError, ExportError
from edgefg.export.qat.fake_quantize import ActivationQuantizer, Rounding, WeightQuantizer
from edgefg.export.tracing.trainable_graph import WEIGHTED, operator_of, source_of, trace, value_of
from edgefg.training.checkpoint import Header, Target, blank, read_header

_AT = "quantizers"
_ANY_CPU_LIMIT = 64
_LIMIT = 127


class QuantizedNetwork(nn.Module):
    """A classifier from ``uint8 [N, H, W, 3]`` RGB to ``float32 [N, classes]`` logits, through fake quantisers.

    Weights are rounded where the data of their convolution or matrix product are.

    Args:
        graph: of `trace`; it is changed.
        quantizers: of activations, by the name of their node.
        any_cpu: 7-bit weights, for CPUs that would saturate with 8.

    Raises:
        ExportError: the graph has no such node.
    """

    def __init__(self, graph: fx.GraphModule, quantizers: Mapping[str, Rounding], *, any_cpu: bool = False) -> None:
        super().__init__()
        self.traced = graph
        nodes = {node.name: node for node in graph.graph.nodes}
        if missing := sorted(quantizers.keys() - nodes.keys()):
            raise ExportError(
                f"{missing[0]} is to be rounded, but lies inside an operator of this network, where training cannot"
                " round; train for tensorrt-onnx or openvino, which round elsewhere"
            )
        for name, quantizer in quantizers.items():
            _insert(graph, nodes[name], name, ActivationQuantizer(quantizer))
        for node in nodes.values():
            if operator_of(node) in WEIGHTED and _is_quantized(source_of(node.args[0])):
                self._quantize_weights(node.args[1], any_cpu)
        graph.recompile()

    def _quantize_weights(self, weights: fx.Node, any_cpu: bool) -> None:
        value = value_of(self.traced, weights)
        if value is not None:  # else computed, or shared and rounded already
            depthwise = value.ndim > 2 and value.shape[1] == 1  # no CPU sums its few products in pairs
            limit = _ANY_CPU_LIMIT if any_cpu and not depthwise else _LIMIT
            _insert(self.traced, weights, weights.name, WeightQuantizer(value, limit))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits of a batch."""
        return cast(torch.Tensor, self.traced(images))

    def freeze(self) -> QuantizedNetwork:
        """Set the scales of the weights for good, as an exporter needs them; return the network itself."""
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


def open_quantized(path: Path, to: Target, precision: str, *, any_cpu: bool | None) -> tuple[QuantizedNetwork, Header]:
    """Load a quantised network for an export.

    Raises:
        CheckpointError, DataError: see `load_quantized`.
        ExportError: the export is not the one that it was trained for.
    """
    quantized = read_header(path).quantized
    asked = to, precision, quantized.any_cpu if quantized and any_cpu is None else any_cpu
    if quantized is not None and asked != (quantized.to, "int8", quantized.any_cpu):
        raise ExportError(
            f"{path} was trained for {_options(quantized.to, 'int8', quantized.any_cpu)}, and other graphs round"
            f" elsewhere; asked was {_options(to, precision, any_cpu)}: export it as trained, or run `edgefg qat` anew"
        )
    return load_quantized(path)


def _options(to: str, precision: str, any_cpu: bool | None) -> str:
    bits = "" if any_cpu is None or to == "tensorrt-onnx" else " --any-cpu" if any_cpu else " --no-any-cpu"
    return f"--to {to} --precision {precision}{bits}"


def load_quantized(path: Path) -> tuple[QuantizedNetwork, Header]:
    """Rebuild a quantised network, frozen, and return it with its header.

    Raises:
        CheckpointError: the file cannot be used, or another version of torch names the graph's tensors otherwise.
        DataError: it is of another stage.
    """
    header = read_header(path)
    if header.quantized is None:
        raise DataError(f"{path} is the checkpoint of a {header.kind}; needed one that `edgefg qat` wrote")
    try:
        tensors = safetensors.torch.load_file(path)
        network = blank(header, {name.removeprefix("traced.network."): tensor for name, tensor in tensors.items()})
        traced = trace(network, header.input, fold_scale=header.quantized.to == "openvino")
        quantized = QuantizedNetwork(traced.graph, _stored(tensors), any_cpu=header.quantized.any_cpu)
        quantized.load_state_dict(tensors)
    except (RuntimeError, AttributeError, ExportError, SafetensorError) as exc:
        raise CheckpointError(
            f"{path} does not fit the {header.backbone} that its header describes, as torch {torch.__version__} traces"
            f" it; it was trained with torch {header.quantized.torch}: {exc}"
        ) from exc
    return quantized.freeze(), header


def _stored(tensors: Mapping[str, torch.Tensor]) -> dict[str, Rounding]:
    """Return the quantisers of activations that a state dict holds."""
    zeros = [name for name in tensors if name.startswith(f"traced.{_AT}.") and name.endswith(".zero")]
    return {
        name.split(".")[2]: Rounding(
            tensors[f"{name.removesuffix('zero')}scale"].numpy(), tensors[name].numpy()
        )
        for name in zeros
    }  # fmt: skip
