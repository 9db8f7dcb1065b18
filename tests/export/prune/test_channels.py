from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from edgefg.artifact.stages import RelativeCost
from edgefg.errors import ExportError
from edgefg.export.prune.channels import remove_channels
from edgefg.export.prune.cost import CostModel
from edgefg.preprocess import InputSpec
from edgefg.settings.pruning import PruningConfig
from edgefg.training.models.backbone import build_backbone
from edgefg.training.models.network import Network
from tests.export.prune.pruning import SIDE, SPEC, gradients_of

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


class Separable(nn.Module):
    """A convolution, a depthwise and a pointwise one, and a scale of its own for each channel of the first two."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.depthwise, self.norm2 = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16)
        self.scale = nn.Parameter(torch.ones(16))
        self.pointwise, self.norm3 = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 3)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.norm2(self.depthwise(x))) * self.scale.view(1, -1, 1, 1)
        x = torch.relu(self.norm3(self.pointwise(x)))
        return self.head(x.mean((2, 3)))


def timm_network() -> Network:
    torch.manual_seed(0)
    return Network(build_backbone("test_efficientnet", 3), (127.0,) * 3, (60.0,) * 3).eval()


def widths_of(network: nn.Module) -> dict[str, int]:
    return {name: module.out_channels for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}


class Recording(CostModel):
    """Keeps every cost that it computes."""

    def __init__(self, original: Network) -> None:
        super().__init__(original, SPEC)
        self.left: list[RelativeCost] = []

    def relative_cost(self, network: Network) -> RelativeCost:
        self.left.append(super().relative_cost(network))
        return self.left[-1]


def remove(network: Network, pruning: PruningConfig, share: float | None = None) -> tuple[Network, list[RelativeCost]]:
    """Prune a copy; return it with what was left before the first step and after each that removed something."""
    pruned, costs = copy.deepcopy(network), Recording(network)
    share = pruning.target()[1] if share is None else share
    result = remove_channels(pruned, pruning, costs, share, gradients_of())
    assert result == costs.left[-1]
    return pruned, costs.left


def kill(body: Any, importance: str) -> None:
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
def test_the_worthless_channel_goes_first(importance: Any) -> None:
    network = plain()
    kill(network.backbone, importance)
    # A channel's bias tells which ones are left.
    network.backbone.norm2.bias.data = torch.arange(16.0)
    pruned, left = remove(network, PruningConfig(importance=importance, round_to=1), 0.9999)
    assert len(left) == 2
    gone = set(range(16)) - set(pruned.backbone.norm2.bias.int().tolist())
    # Duplicates are equally far from all others, so they go together.
    assert gone == ({2, DEAD} if importance == "fpgm" else {DEAD})
    assert widths_of(pruned.backbone) == {"first": 16, "second": 16 - len(gone), "third": 16}


def gone_by_loss(body: nn.Module, parameter: str, norm: str, worthless: list[int], dim: int = 0) -> set[int]:
    """Let the loss depend on one parameter alone, and there not on some channels; return those of a norm that went."""
    network = Network(body, (127.0,) * 3, (60.0,) * 3).eval()
    body.get_submodule(norm).running_mean.copy_(torch.arange(16.0))  # tells which ones are left

    def fill(network: Network) -> None:
        for one in network.backbone.parameters():
            one.grad = torch.zeros_like(one)
        one = network.backbone.get_parameter(parameter)
        one.data.fill_(0.5)
        one.grad.fill_(-0.01).index_fill_(dim, torch.tensor(worthless), 0)

    remove_channels(
        network, PruningConfig(uniform=True, round_to=1), CostModel(copy.deepcopy(network), SPEC), 0.9999, fill
    )
    return set(range(16)) - set(body.get_submodule(norm).running_mean.int().tolist())


@pytest.mark.parametrize(
    ("parameter", "dim"),
    [
        *((f"{layer}.{name}", 0) for layer in ("first", "norm", "depthwise", "norm2") for name in ("weight", "bias")),
        *(("scale", 0), ("pointwise.weight", 1)),
    ],
)
def test_all_parameters_of_a_channel_count_for_the_change_of_the_loss(parameter: str, dim: int) -> None:
    assert gone_by_loss(Separable(), parameter, "norm", [DEAD], dim) == {DEAD}


def test_the_change_of_the_loss_in_a_grouped_convolution() -> None:
    """Its second dimension counts the inputs of one group: here each group does without its third."""
    assert gone_by_loss(Plain(groups=4), "third.weight", "norm2", [2], dim=1) == {2, 6, 10, 14}


def test_two_parameters_of_a_norm_weigh_as_much_as_hundreds_of_a_filter() -> None:
    """Terms of random sign: those of many weights cancel out, so that their absolute values would say too much."""
    body = Plain()
    network = Network(body, (127.0,) * 3, (60.0,) * 3).eval()
    body.norm.running_mean.copy_(torch.arange(16.0))
    signs = torch.randn(16, 16, 3, 3, generator=torch.Generator().manual_seed(0)).sign()

    def fill(network: Network) -> None:
        for one in body.parameters():
            one.grad = torch.zeros_like(one)
        for scale, terms in ((body.norm.weight, torch.full((16,), 0.5)), (body.second.weight, signs / 144**0.5)):
            scale.data.fill_(1)
            scale.grad = terms.clone()
        body.norm.weight.grad[DEAD] = 0
        body.second.weight.grad[:, 9] *= 0.95

    remove_channels(
        network, PruningConfig(uniform=True, round_to=1), CostModel(copy.deepcopy(network), SPEC), 0.9999, fill
    )
    assert set(range(16)) - set(body.norm.running_mean.int().tolist()) == {DEAD}


def test_what_one_importance_calls_worthless_another_keeps() -> None:
    """The scale of a batch norm says nothing about the distances between filters."""
    network = plain()
    kill(network.backbone, "fpgm")
    network.backbone.norm2.weight.data[11] = 0
    network.backbone.norm2.bias.data = torch.arange(16.0)
    expected: list[tuple[Any, set[int]]] = [("fpgm", {2, DEAD}), ("bn-scale", {11})]
    for importance, gone in expected:
        pruned, _ = remove(network, PruningConfig(importance=importance, round_to=1), 0.9999)
        assert set(range(16)) - set(pruned.backbone.norm2.bias.int().tolist()) <= gone


def test_a_layer_of_zeros_is_no_obstacle() -> None:
    """Its mean is zero, by which nothing can be divided; it goes as far as the cap lets it."""
    network = plain()
    network.backbone.second.weight.data.zero_()
    network.backbone.norm2.weight.data.zero_()
    network.backbone.third.weight.data.zero_()
    pruned, _ = remove(network, PruningConfig(importance="magnitude", round_to=4), 0.9999)
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
    importance: Any, ranking: str, round_to: int, max_ratio: float, share: float, measure: str, width: int, groups: int
) -> None:
    network = plain(width=width, groups=groups)
    pruning = PruningConfig(
        importance=importance, isomorphic=ranking == "isomorphic", uniform=ranking == "uniform",
        round_to=round_to, max_ratio=max_ratio,
        macs=share if measure == "macs" else None, params=share if measure == "params" else None,
    )  # fmt: skip
    pruned, costs = copy.deepcopy(network), Recording(network)
    try:
        remove_channels(pruned, pruning, costs, share, gradients_of())
        reached = True
    except ExportError:
        reached = False
    left = [cost.of(pruning.target()[0]) for cost in costs.left]
    assert left[-1] <= share < min(left[:-1]) if reached else left[-1] > share
    assert left == sorted(left, reverse=True)
    for name, found in widths_of(pruned.backbone).items():
        assert found == width or (found % round_to == 0 and 0 < width - found <= width * max_ratio + 1e-6), name
    images = torch.zeros(2, SIDE, SIDE, 3, dtype=torch.uint8)
    assert pruned(images).shape == (2, 3)


@pytest.mark.parametrize(
    ("width", "round_to", "max_ratio", "least"),
    [
        *((32, 16, 0.25, 32), (24, 16, 0.25, 24), (24, 8, 0.25, 24), (24, 4, 0.25, 20), (40, 16, 0.25, 32)),
        *((64, 16, 0.25, 48), (32, 16, 0.49, 32), (32, 16, 0.5, 16), (12, 16, 0.9, 12)),
        (20, 2, 0.7, 6),  # 20 · (1 − 0.7) is a bit more than 6, and no reason to keep 8
    ],
)
def test_no_layer_loses_more_than_the_cap(width: int, round_to: int, max_ratio: float, least: int) -> None:
    network = plain(width=width)
    pruning = PruningConfig(importance="magnitude", round_to=round_to, max_ratio=max_ratio)
    complaint = f"{max_ratio:.0%} .* in multiples of {round_to}, .* Raise --max-ratio, lower --round-to"
    with pytest.raises(ExportError, match=complaint):
        remove_channels(network, pruning, CostModel(copy.deepcopy(network), SPEC), 0.001, gradients_of())
    assert set(widths_of(network.backbone).values()) == {least}


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["tf_efficientnet_lite0", "tf_efficientnet_lite2", "torchvision:resnet18"])
@pytest.mark.parametrize(("share", "max_ratio"), [(0.7, 0.25), (0.5, 0.55)])
def test_usual_targets_are_within_the_cap(backbone: str, share: float, max_ratio: float) -> None:
    """By the defaults, and with the cap that a search gives to half of the operations."""
    network = Network(build_backbone(backbone, 3), (127.0,) * 3, (60.0,) * 3).eval()
    before, cost_model = widths_of(network), CostModel(copy.deepcopy(network), InputSpec(height=64, width=64))
    pruning = PruningConfig(importance="magnitude", max_ratio=max_ratio)
    assert remove_channels(network, pruning, cost_model, share, gradients_of()).macs <= share
    assert all(width >= before[name] * (1 - max_ratio) - 1e-6 for name, width in widths_of(network).items())


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_the_step_that_crosses_the_target_is_the_last(importance: Any) -> None:
    targets: list[dict[str, Any]] = [{"macs": 0.8}, {"params": 0.8}]
    for target in targets:
        pruning = PruningConfig(importance=importance, round_to=4, **target)
        measure, share = pruning.target()
        _, left = remove(timm_network(), pruning)
        assert left[0] == RelativeCost(macs=1.0, params=1.0)
        assert left[-1].of(measure) <= share < min(step.of(measure) for step in left[:-1])


def test_each_ranking_removes_other_channels() -> None:
    settings: dict[str, Any] = {"importance": "magnitude", "round_to": 8, "max_ratio": 0.5, "macs": 0.6}
    rankings: list[dict[str, Any]] = [{}, {"isomorphic": True}, {"uniform": True}]
    found = [widths_of(remove(timm_network(), PruningConfig(**settings, **ranking))[0]) for ranking in rankings]
    assert found[0] != found[1] != found[2] != found[0]


def test_uniform_takes_about_the_same_share_of_every_layer() -> None:
    pruned, _ = remove(plain(width=40), PruningConfig(uniform=True, round_to=4, max_ratio=0.5, importance="magnitude"))
    assert len(set(widths_of(pruned.backbone).values())) == 1


def test_the_cap_counts_from_the_unpruned_network_however_often_one_prunes() -> None:
    network = timm_network()
    pruning = PruningConfig(importance="magnitude", round_to=8)
    pruned = copy.deepcopy(network)
    cost_model = CostModel(network, SPEC)
    with pytest.raises(ExportError, match="Raise --max-ratio"):
        remove_channels(pruned, pruning, cost_model, 0.01, gradients_of())
    before = widths_of(pruned)
    with pytest.raises(ExportError, match="Raise --max-ratio"):
        remove_channels(pruned, pruning, cost_model, 0.01, gradients_of())
    assert widths_of(pruned) == before
    assert before != widths_of(network)


def test_a_network_that_is_small_enough_stays_as_it_is() -> None:
    network = timm_network()
    pruned, _ = remove(network, PruningConfig(importance="magnitude", round_to=4), 0.8)
    again = copy.deepcopy(pruned)
    left = remove_channels(again, PruningConfig(round_to=4), CostModel(network, SPEC), 0.8, gradients_of())
    assert left.macs <= 0.8
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), pruned.parameters(), strict=True))


def test_bn_scale_without_batch_norms() -> None:
    network = plain()
    network.backbone.norm = network.backbone.norm2 = network.backbone.norm3 = nn.Identity()
    with pytest.raises(ExportError, match="--importance bn-scale does not apply to any layer"):
        remove(network, PruningConfig(importance="bn-scale", round_to=4))
