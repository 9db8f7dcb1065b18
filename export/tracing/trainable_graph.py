"""Network → a graph of plain operators that can be trained and exported, batch norms folded into the convolutions.

Fake quantisers need a graph, since no module computes the skip of a residual Add. Batch norms are folded first, since
8 bits must fit the weights of the deployed graph, which has them folded. Their statistics are thereby frozen.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import onnx
import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from edgefg.errors import ExportError, one_line
from edgefg.export.tracing.onnx_exporter import contiguous_planes, to_graph_and_program
from edgefg.preprocess import InputSpec
from edgefg.quiet import quiet
from edgefg.training.models.network import Network

_ATEN = torch.ops.aten
WEIGHTED = (_ATEN.conv1d, _ATEN.conv2d, _ATEN.conv3d, _ATEN.linear)
"""Operators that run in 8 bits. Their second argument is the weights, by output channel."""
# Operators that move, pad with zeros or pool values: data stay in 8 bits through them.
_LAYOUT = (_ATEN.clone, _ATEN.contiguous, _ATEN.pad, _ATEN.constant_pad_nd)
_HANDED_ON = (
    *_LAYOUT, _ATEN.view, _ATEN.reshape, _ATEN.flatten, _ATEN.permute, _ATEN.transpose, _ATEN.squeeze, _ATEN.unsqueeze,
    _ATEN.max_pool2d, _ATEN.avg_pool2d,
)  # fmt: skip


class Traced(NamedTuple):
    """A network in two forms, with the same names of tensors."""

    graph: fx.GraphModule
    """Takes ``uint8 [N, height, width, 3]``, gives ``float32 [N, classes]``."""
    model: onnx.ModelProto
    """FP32 ONNX with a free batch size."""


def trace(network: Network, spec: InputSpec, *, fold_scale: bool) -> Traced:
    """Trace a network in evaluation mode; the graph has weights of its own.

    Args:
        network: a network of a single pass. Dropout and stochastic depth are left out, as in evaluation.
        spec: the network's input.
        fold_scale: fold the normalisation's division into the first convolution too, as OpenVINO does.

    Raises:
        ExportError: the exporter does not support the network.
    """
    network = copy.deepcopy(network).eval()
    example = torch.zeros(2, spec.height, spec.width, 3, dtype=torch.uint8)
    batch = {"images": {0: torch.export.Dim("batch")}}
    try:
        with quiet(), contiguous_planes(network):
            program = torch.export.export(_Rooted(network), (example,), dynamic_shapes=batch)
    except Exception as exc:  # torch.export raises Python's as well
        raise ExportError(f"the network cannot be traced: {one_line(exc)[:300]}") from exc
    graph = _module_of(program)
    _fold_batch_norms(graph)
    if fold_scale:
        _fold_scale(graph)
    _clean(graph)
    # The exporter rewrites the graph and renames its tensors: only its program has the names of the ONNX graph.
    model, rewritten = to_graph_and_program(graph, spec, batch=0)
    return Traced(_module_of(rewritten), model)


class _Rooted(nn.Module):
    """Moves a network one level down, so that the names of its tensors hold a dot and cannot be an operator's."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> Any:
        return self.network(images)


def _module_of(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """Return a program as an ordinary module, since its own refuses ``train()``."""
    module: Any = program.module(check_guards=False)
    return fx.GraphModule(module, module.graph)


def _clean(graph: fx.GraphModule) -> None:
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.recompile()


def value_of(graph: fx.GraphModule, node: Any) -> torch.Tensor | None:
    """Return the parameter or buffer that an operator's argument stands for, if any."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    owner, _, leaf = str(node.target).rpartition(".")
    value: torch.Tensor = getattr(graph.get_submodule(owner), leaf)
    return value


def operator_of(node: Any) -> Any:
    """Return the operator that a node calls, of any overload; None if it calls none."""
    return getattr(node.target, "overloadpacket", None) if isinstance(node, fx.Node) else None


def origin_of(node: Any) -> Any:
    """Return the node that computed the values of a tensor, which layout operators only move."""
    while operator_of(node) in _HANDED_ON and not _fills(node):
        node = node.args[0]
    return node


def _fills(node: fx.Node) -> bool:
    """Tell whether a node pads with another value than zero, which 8 bits may not hold."""
    position = {_ATEN.pad: 3, _ATEN.constant_pad_nd: 2}.get(operator_of(node))
    return position is not None and any((*node.args[position:], node.kwargs.get("value")))


def _fold_batch_norms(graph: fx.GraphModule) -> None:
    """Fold every batch norm into the convolution before it, if nothing else reads that."""
    for norm in list(graph.graph.nodes):
        if operator_of(norm) is not _ATEN.batch_norm:
            continue
        conv = norm.args[0]
        if operator_of(conv) not in WEIGHTED[:3] or len(conv.users) > 1 or len(conv.args[1].users) > 1:
            continue
        data, weight, *rest = conv.args
        bias = rest.pop(0) if rest else None
        weights, (scale, shift, mean, variance) = (
            value_of(graph, weight),
            (value_of(graph, it) for it in norm.args[1:5]),
        )
        if weights is None or mean is None or variance is None:
            continue  # computed while the network runs
        folded = fuse_conv_bn_weights(weights, value_of(graph, bias), mean, variance, norm.args[7], scale, shift)
        owner = str(weight.target).rpartition(".")[0]
        for leaf, value in zip(("weight", "bias"), folded, strict=True):
            setattr(graph.get_submodule(owner), leaf, nn.Parameter(value.detach().clone()))
        with graph.graph.inserting_before(conv):
            names = [graph.graph.get_attr(f"{owner}.{leaf}") for leaf in ("weight", "bias")]
        conv.args = (data, *names, *rest)
        norm.replace_all_uses_with(conv)
        graph.graph.erase_node(norm)


def _fold_scale(graph: fx.GraphModule) -> None:
    """Fold the first division by a constant, one number per channel, into the convolution that reads it.

    The weights become a buffer and are not trained: they are so small that Adam's steps, which have one size for all
    weights, would change them by half.
    """
    division = next((node for node in graph.graph.nodes if operator_of(node) is _ATEN.div), None)
    if division is None or len(division.users) != 1:
        return
    scale, conv = value_of(graph, division.args[1]), _only_reader(division)
    weights = value_of(graph, conv.args[1]) if operator_of(conv) is _ATEN.conv2d else None
    if scale is None or weights is None or scale.numel() != weights.shape[1] or len(conv.args[1].users) > 1:
        return
    folded = weights.detach() / scale.to(weights).reshape(1, -1, 1, 1)
    owner, _, leaf = str(conv.args[1].target).rpartition(".")
    delattr(graph.get_submodule(owner), leaf)
    graph.get_submodule(owner).register_buffer(leaf, folded)
    division.replace_all_uses_with(division.args[0])
    graph.graph.erase_node(division)


def _only_reader(node: fx.Node) -> Any:
    """Return the one node that reads a tensor, padded or moved; None if there are several."""
    while len(node.users) == 1:
        (node,) = node.users
        if operator_of(node) not in _LAYOUT:
            return node
    return None
