from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from edgefg.errors import ExportError
from edgefg.export.channels import remove_channels
from edgefg.export.shares import Shares, Yardstick
from edgefg.recipe import Pruning
from edgefg.training.models.backbone import build_backbone
from edgefg.training.models.network import Network
from tests.export.pruning import SIDE, SPEC, gradients_of

IMPORTANCES = ("taylor", "magnitude", "fpgm", "bn-scale")
DEAD = 5


class Plain(nn.Module):
    """Convolutions with batch norms and a head; the third one may be grouped."""

    def __init__(self, width: int = 16, groups: int = 1) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.second, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.third, self.norm3 = nn.Conv2d(width, width, 3, groups=groups, bias=False), nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 3)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.norm2(self.second(x)))
        x = torch.relu(self.norm3(self.third(x)))
        return self.head(x.mean((2, 3)))


def plain(**changes: Any) -> Network:
    """Batch norms as after training: no two scales alike."""
    torch.manual_seed(0)
    body = Plain(**changes)
    for module in body.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return Network(body, (127.0,) * 3, (60.0,) * 3).eval()


def timm_network() -> Network:
    torch.manual_seed(0)
    return Network(build_backbone("test_efficientnet", 3), (127.0,) * 3, (60.0,) * 3).eval()


def widths_of(network: nn.Module) -> dict[str, int]:
    return {name: module.out_channels for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}


def remove(network: Network, pruning: Pruning, share: float | None = None) -> tuple[Network, list[Shares]]:
    """Prune a copy; return it with what was left before the first step and after each that removed something."""
    left: list[Shares] = []

    class Recording(Yardstick):
        def measure(self, network: Network) -> Shares:
            left.append(super().measure(network))
            return left[-1]

    pruned = copy.deepcopy(network)
    share = pruning.target()[1] if share is None else share
    result = remove_channels(pruned, pruning, Recording(network, SPEC), share, gradients_of())
    assert result == left[-1]
    return pruned, left


def kill(body: Plain, importance: str) -> None:
    """Make one channel of the second convolution worthless in the eyes of one importance, and of no other."""
    with torch.no_grad():
        if importance == "taylor":
            body.third.weight[:, DEAD] = 0  # nobody listens, so that no gradient comes back either
        elif importance == "magnitude":
            for tensor in (body.second.weight[DEAD], body.norm2.weight[DEAD], body.third.weight[:, DEAD]):
                tensor.zero_()
        elif importance == "bn-scale":
            body.norm2.weight[DEAD] = 0
        else:
            filters = torch.linalg.qr(torch.randn(144, 16))[0].T.reshape(16, 16, 3, 3)
            body.second.weight.copy_(filters)
            body.first.weight.copy_(torch.linalg.qr(torch.randn(27, 16))[0].T.reshape(16, 3, 3, 3))
            body.third.weight.copy_(filters)
            body.second.weight[DEAD] = body.second.weight[2]
            body.second.weight[9] = -body.second.weight[7]  # as far from it as can be, and no duplicate


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_the_worthless_channel_goes_first(importance: str) -> None:
    network = plain()
    kill(network.backbone, importance)
    # A channel's bias tells which ones are left.
    network.backbone.norm2.bias.data = torch.arange(16.0)
    pruned, left = remove(network, Pruning(importance=importance, round_to=1), 0.9999)
    assert len(left) == 2
    gone = set(range(16)) - set(pruned.backbone.norm2.bias.int().tolist())
    # Duplicates are equally far from all others, so they go together.
    assert gone == ({2, DEAD} if importance == "fpgm" else {DEAD})
    assert widths_of(pruned.backbone) == {"first": 16, "second": 16 - len(gone), "third": 16}


def test_what_one_importance_calls_worthless_another_keeps() -> None:
    """The scale of a batch norm says nothing about the distances between filters."""
    network = plain()
    kill(network.backbone, "fpgm")
    network.backbone.norm2.weight.data[11] = 0
    network.backbone.norm2.bias.data = torch.arange(16.0)
    for importance, gone in (("fpgm", {2, DEAD}), ("bn-scale", {11})):
        pruned, _ = remove(network, Pruning(importance=importance, round_to=1), 0.9999)
        assert set(range(16)) - set(pruned.backbone.norm2.bias.int().tolist()) <= gone


def test_a_layer_of_zeros_is_no_obstacle() -> None:
    """Its mean is zero, by which nothing can be divided; it goes as far as the cap lets it."""
    network = plain()
    network.backbone.second.weight.data.zero_()
    network.backbone.norm2.weight.data.zero_()
    network.backbone.third.weight.data.zero_()
    pruned, _ = remove(network, Pruning(importance="magnitude", round_to=4), 0.9999)
    assert widths_of(pruned.backbone) == {"first": 16, "second": 12, "third": 16}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    importance=st.sampled_from(IMPORTANCES),
    ranking=st.sampled_from(["global", "isomorphic", "uniform"]),
    round_to=st.sampled_from([1, 3, 4, 8, 16]),
    max_ratio=st.floats(0.05, 0.9),
    share=st.floats(0.05, 0.99),
    measure=st.sampled_from(["macs", "params"]),
    width=st.sampled_from([8, 20, 24]),
    groups=st.sampled_from([1, 4]),
)
def test_cap_multiples_and_target_hold_for_all_settings(
    importance: str, ranking: str, round_to: int, max_ratio: float, share: float, measure: str, width: int, groups: int
) -> None:
    network = plain(width=width, groups=groups)
    pruning = Pruning(
        importance=importance, isomorphic=ranking == "isomorphic", uniform=ranking == "uniform",
        round_to=round_to, max_ratio=max_ratio, **{measure: share},
    )  # fmt: skip
    pruned, left = copy.deepcopy(network), [1.0]
    yardstick = Yardstick(network, SPEC)
    try:
        remove_channels(
            pruned, pruning, yardstick, share, gradients_of(),
            lambda _: left.append(yardstick.measure(pruned).of(pruning.target()[0])),
        )  # fmt: skip
    except ExportError:
        assert left[-1] > share
    else:
        assert left[-1] <= share < min(left[:-1])
    assert left == sorted(left, reverse=True)
    least = math.ceil(width * (1 - max_ratio))
    for name, found in widths_of(pruned.backbone).items():
        assert found == width or (found % round_to == 0 and max(1, least - round_to / 2) <= found < width), name
    images = torch.zeros(2, SIDE, SIDE, 3, dtype=torch.uint8)
    assert pruned(images).shape == (2, 3)


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_the_step_that_crosses_the_target_is_the_last(importance: str) -> None:
    for target in ({"macs": 0.8}, {"params": 0.8}):
        pruning = Pruning(importance=importance, round_to=8, **target)
        measure, share = pruning.target()
        _, left = remove(timm_network(), pruning)
        assert left[0] == Shares(1.0, 1.0)
        assert left[-1].of(measure) <= share < min(step.of(measure) for step in left[:-1])


def test_each_ranking_removes_other_channels() -> None:
    settings = {"importance": "magnitude", "round_to": 8, "max_ratio": 0.5, "macs": 0.6}
    found = [
        widths_of(remove(timm_network(), Pruning(**settings, **ranking))[0])
        for ranking in ({}, {"isomorphic": True}, {"uniform": True})
    ]
    assert found[0] != found[1] != found[2] != found[0]


def test_uniform_takes_about_the_same_share_of_every_layer() -> None:
    pruned, _ = remove(plain(width=40), Pruning(uniform=True, round_to=4, max_ratio=0.5, importance="magnitude"))
    assert len(set(widths_of(pruned.backbone).values())) == 1


def test_the_cap_counts_from_the_unpruned_network_however_often_one_prunes() -> None:
    network = timm_network()
    pruning = Pruning(importance="magnitude", round_to=8)
    pruned = copy.deepcopy(network)
    yardstick = Yardstick(network, SPEC)
    with pytest.raises(ExportError, match="raise --max-ratio"):
        remove_channels(pruned, pruning, yardstick, 0.01, gradients_of())
    before = widths_of(pruned)
    with pytest.raises(ExportError, match="raise --max-ratio"):
        remove_channels(pruned, pruning, yardstick, 0.01, gradients_of())
    assert widths_of(pruned) == before
    assert before != widths_of(network)


def test_a_network_that_is_small_enough_stays_as_it_is() -> None:
    network = timm_network()
    pruned, _ = remove(network, Pruning(importance="magnitude", round_to=8), 0.8)
    again = copy.deepcopy(pruned)
    left = remove_channels(again, Pruning(round_to=8), Yardstick(network, SPEC), 0.8, gradients_of())
    assert left.macs <= 0.8
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), pruned.parameters(), strict=True))


def test_bn_scale_without_batch_norms() -> None:
    network = plain()
    network.backbone.norm = network.backbone.norm2 = network.backbone.norm3 = nn.Identity()
    with pytest.raises(ExportError, match="no layer has what importance bn-scale looks at"):
        remove(network, Pruning(importance="bn-scale", round_to=4))
