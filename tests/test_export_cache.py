"""Exports shared by tests: equal networks have one fingerprint, and whatever could change the graph changes it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from edgefg.export.tracing.onnx_exporter import contiguous_planes
from edgefg.training.models.network import Network
from tests.export_cache import fingerprint


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


@torch.no_grad()
def _other_weight(network: Network) -> None:
    next(network.backbone.parameters())[0, 0, 0, 0] += 1e-6


def _other_buffer(network: Network) -> None:
    network.backbone.offset.fill_(1)


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
    "change", [_other_weight, _other_buffer, _other_attribute, _other_padding, _other_forward, _hook]
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
