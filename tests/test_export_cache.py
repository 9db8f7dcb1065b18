"""Exports shared by tests: equal networks have one fingerprint, and whatever could change the graph changes it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from edgefg.export.tracing.onnx_exporter import contiguous_planes, to_graph, to_graph_and_program
from edgefg.preprocess import InputSpec
from edgefg.training.models.backbone import build_backbone
from edgefg.training.models.network import Network
from tests.export_cache import fingerprint, sharing


class _Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.factor = 2.0
        self.register_buffer("offset", torch.zeros(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).mean((2, 3)) * self.factor + self.offset


def _network() -> Network:
    torch.manual_seed(0)
    return Network(_Scaled(), (127.0,) * 3, (128.0,) * 3).eval()


def _other_shape(network: Network) -> None:
    network.backbone.offset.resize_(4).zero_()


def _other_dtype(network: Network) -> None:
    network.backbone.offset = network.backbone.offset.double()


def _tied(network: Network) -> None:
    network.backbone.again = network.backbone.conv.weight


def _constant(network: Network) -> None:
    network.backbone.constant = torch.ones(1)


def _other_attribute(network: Network) -> None:
    network.backbone.factor = 3.0  # type: ignore[assignment]


def _other_padding(network: Network) -> None:
    network.backbone.conv.padding = (1, 1)


def _other_forward(network: Network) -> None:
    network.backbone.forward = lambda x: x.mean((2, 3))


def _hook(network: Network) -> None:
    network.backbone.register_forward_hook(lambda *_: None)


def test_equal_networks_are_one() -> None:
    assert fingerprint(_network(), 1) == fingerprint(_network(), 1) != fingerprint(_network(), 2)
    network = _network()
    plain = fingerprint(network)
    with contiguous_planes(network):
        assert fingerprint(network) != plain
    assert fingerprint(network) == plain


@pytest.mark.parametrize(
    "change", [_other_shape, _other_dtype, _tied, _constant, _other_attribute, _other_padding, _other_forward, _hook]
)
def test_whatever_could_change_the_graph_changes_the_fingerprint(change: Callable[[Network], None]) -> None:
    network = _network()
    change(network)
    assert fingerprint(network) != fingerprint(_network())


def test_what_cannot_be_compared_is_not_shared() -> None:
    network = _network()
    network.backbone.secret = object()  # type: ignore[assignment]
    with pytest.raises(TypeError, match="has no comparable form"):
        fingerprint(network)


@torch.no_grad()
def test_another_networks_tensors_give_what_the_exporter_gives(tmp_path: Path) -> None:
    spec = InputSpec(height=8, width=8)
    other = _network()
    for tensor in (*other.parameters(), *other.buffers()):
        tensor.add_(torch.rand_like(tensor))
    exporter = inspect.unwrap(torch.onnx.export)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", exporter)
        expected, program = to_graph_and_program(other, spec)
        with contextlib.contextmanager(sharing)(tmp_path):
            first, _ = to_graph_and_program(_network(), spec)
            found, found_program = to_graph_and_program(other, spec)
        assert len(list(tmp_path.iterdir())) == 1
    assert found == expected != first
    images = torch.arange(192, dtype=torch.uint8).reshape(1, 8, 8, 3)
    torch.testing.assert_close(found_program.module()(images), program.module()(images), rtol=0, atol=0)


def test_what_is_computed_from_tensors_is_not_shared(tmp_path: Path) -> None:
    spec = InputSpec(height=8, width=8)
    network = _network()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", inspect.unwrap(torch.onnx.export))
        patch.setattr("tests.export_cache._named", lambda _: iter(()))  # as if the exporter had made all initializers
        with contextlib.contextmanager(sharing)(tmp_path):
            to_graph_and_program(network, spec)
    assert not list(tmp_path.rglob("model.onnx"))


@pytest.mark.slow
def test_a_resnet_s_batch_norms_are_folded_with_its_own_tensors(tmp_path: Path) -> None:
    spec = InputSpec(height=32, width=32)
    one, other = (Network(build_backbone("resnet10t", 4), (127.0,) * 3, (128.0,) * 3) for _ in range(2))
    with torch.no_grad():
        other.backbone(torch.randn(8, 3, 32, 32))  # in training: other running statistics
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", inspect.unwrap(torch.onnx.export))
        expected = to_graph(other.eval(), spec)
        with contextlib.contextmanager(sharing)(tmp_path):
            first, found = to_graph(one.eval(), spec), to_graph(other, spec)
    assert [*found.graph.initializer] == [*expected.graph.initializer] != [*first.graph.initializer]
    assert [node.op_type for node in found.graph.node] == [node.op_type for node in expected.graph.node]
