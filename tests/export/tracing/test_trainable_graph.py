"""The trainable graph: the same function as the network, batch norms folded, tensors named as in its ONNX form."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from torch import fx, nn

from edgefg.errors import ExportError
from edgefg.export.tracing.onnx_exporter import torch_logits
from edgefg.export.tracing.trainable_graph import Traced, operator_of, origin_of, trace, value_of
from edgefg.preprocess import InputSpec
from edgefg.training.models.network import Network

ATEN = torch.ops.aten
SPEC = InputSpec(height=16, width=16)
INPUTS = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)


class Body(nn.Module):
    """A convolution with a batch norm, one without, and a padding of ones before it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.pad = nn.ConstantPad2d(1, 1.0)
        self.second = nn.Conv2d(4, 5, 3)
        self.head = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pad(torch.relu(self.norm(self.first(x))))
        return self.head(self.second(x).mean((2, 3)))


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    body = Body()
    body.norm(3 + 2 * torch.randn(64, 4, 4, 4))  # statistics that matter
    return Network(body, (120.0,) * 3, (60.0,) * 3).eval()


@pytest.fixture(scope="module")
def traced(network: Network) -> Traced:
    return trace(network, SPEC, fold_scale=False)


def _nodes(graph: fx.GraphModule, operator: object) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if operator_of(node) is operator]


def test_graph_and_onnx_compute_what_the_network_does(network: Network, traced: Traced) -> None:
    expected = torch_logits(network, INPUTS)
    assert np.abs(torch_logits(traced.graph, INPUTS) - expected).max() <= 1e-4 * np.abs(expected).max()
    session = onnxruntime.InferenceSession(traced.model.SerializeToString())
    found = session.run(None, {"images": INPUTS})[0]
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_batch_norms_are_folded_and_the_network_is_not_changed(network: Network, traced: Traced) -> None:
    assert not _nodes(traced.graph, ATEN.batch_norm)
    (first, _) = _nodes(traced.graph, ATEN.conv2d)
    own, folded = network.backbone.get_parameter("first.weight"), value_of(traced.graph, first.args[1])
    assert folded is not None
    assert not torch.equal(own, folded)
    assert value_of(traced.graph, first.args[2]) is not None, "the folded convolution has a bias"


def test_tensors_have_the_names_of_the_onnx_graph(traced: Traced) -> None:
    written = {name for node in traced.model.graph.node for name in node.output}
    names = {node.name for node in traced.graph.graph.nodes}
    convolutions = {node.name for node in _nodes(traced.graph, ATEN.conv2d)}
    assert len(convolutions) == 2
    assert convolutions <= written
    assert len(written & names) > 5


def test_the_graph_can_be_trained(traced: Traced) -> None:
    traced.graph.train()
    traced.graph(torch.from_numpy(INPUTS)).sum().backward()
    assert all(parameter.grad is not None for parameter in traced.graph.parameters())


def test_the_scale_is_folded_into_weights_that_learn_no_more(network: Network, traced: Traced) -> None:
    folded = trace(network, SPEC, fold_scale=True).graph
    assert _nodes(traced.graph, ATEN.div)
    assert not _nodes(folded, ATEN.div)
    assert len(list(folded.parameters())) == len(list(traced.graph.parameters())) - 1
    expected = torch_logits(network, INPUTS)
    assert np.abs(torch_logits(folded, INPUTS) - expected).max() <= 1e-4 * np.abs(expected).max()


def test_values_pass_through_layout_but_not_through_a_padding_of_ones(traced: Traced) -> None:
    first, second = _nodes(traced.graph, ATEN.conv2d)
    assert origin_of(second.args[0]) is second.args[0], "ones may not be among the levels"
    planes = origin_of(first.args[0])
    assert operator_of(planes) is ATEN.div
    assert planes is not first.args[0], "needed a layout between the two"


def test_a_network_that_cannot_be_traced_is_one_line() -> None:
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((2, 3)) if bool(x.sum() > 0) else x.amax((2, 3))

    network = Network(Branching(), (0.0,) * 3, (1.0,) * 3).eval()
    with pytest.raises(ExportError, match=r"the network cannot be traced: .+") as caught:
        trace(network, SPEC, fold_scale=False)
    assert "\n" not in str(caught.value)
