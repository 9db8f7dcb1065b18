"""SE and CBAM: gates on the feature maps, put into a backbone that may be pretrained.

Hu, Shen & Sun 2018, "Squeeze-and-Excitation Networks"; Woo, Park, Lee & Kweon 2018, "CBAM: Convolutional Block
Attention Module". A gate goes where the papers have it: into every residual block, before the addition; in a backbone
without known blocks, after every stage.

A new gate of random weights would halve every map (σ(0) = 0.5) and so throw away what a pretrained backbone knows. Ours
start at σ(5) = 0.993 for every input: the last weights are 0 and the bias is 5, which leaves a slope to learn by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any, ClassVar, cast

import msgspec
import torch
import torchvision
from msgspec import Meta
from timm.layers import create_attn
from torch import nn

from edgefg.errors import WeightsError
from edgefg.training.models import backbone as parts
from edgefg.training.models.backbone import Triple
from edgefg.training.models.network import Attention, Network, scaled

_OPEN = 5.0

# (module, name of its child): where a gate may go
Place = tuple[nn.Module, str]


class GateOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of SE and CBAM."""

    reduction: Annotated[int, Meta(description="r: channels are squeezed to 1/r of them", ge=1)] = 16


def squeeze_excite(channels: int, reduction: int) -> nn.Module:
    """Build SE, s = σ(W₂ relu(W₁ GAP(x))), which scales channels of ``float [N, C, h, w]``; nearly open at first."""
    gate = cast(nn.Module, create_attn("se", channels, rd_channels=max(1, channels // reduction)))
    _open_last(gate, _OPEN)
    return gate


def cbam(channels: int, reduction: int) -> nn.Module:
    """Build CBAM: channels scaled by σ(MLP(avg) + MLP(max)), then positions by σ(BN(conv7×7[mean; max])).

    For ``float [N, C, h, w]``; nearly open at first.
    """
    gate = cast(nn.Module, create_attn("cbam", channels, rd_channels=max(1, channels // reduction), mlp_bias=True))
    # The shared MLP, and with it its bias, counts twice.
    _open_last(gate.get_submodule("channel"), _OPEN / 2)
    # Not the convolution's weights: batch normalisation of a constant has a slope of 1/√(its epsilon).
    norm = cast(nn.BatchNorm2d, gate.get_submodule("spatial.conv.bn"))
    nn.init.zeros_(norm.weight)
    nn.init.constant_(norm.bias, _OPEN)
    return gate


def _open_last(gate: nn.Module, bias: float) -> None:
    last = cast(nn.Conv2d, gate.get_submodule("fc2"))
    nn.init.zeros_(last.weight)
    nn.init.constant_(cast(nn.Parameter, last.bias), bias)


def insert_gates(backbone: nn.Module, gate_of: Callable[[int], nn.Module]) -> list[nn.Module]:
    """Put gates into a backbone, in place, and return them in the order in which the maps pass them.

    The first of these kinds of places that a backbone has: the free ``se`` slots of timm's residual blocks; after the
    last norm of torchvision's residual blocks; after every stage. A gate that the backbone has already stays.

    Args:
        backbone: a timm or torchvision classifier.
        gate_of: builds a gate from its number of channels.

    Raises:
        WeightsError: the backbone has no feature maps, or no place for a gate.
    """
    for places in (_slots, _torchvision_blocks, _stages):
        gates = _fill(backbone, list(places(backbone)), gate_of)
        if gates:
            return gates
    raise WeightsError(
        f"{type(backbone).__name__} has no residual block or stage that a gate fits into; needed a convolutional"
        " backbone, for instance resnet50"
    )


def _slots(backbone: nn.Module) -> Iterator[Place]:
    """Find the attention slots of timm's blocks: None in ResNets, an identity in MBConv and RegNet."""
    for module in backbone.modules():
        if hasattr(module, "se") and (module.se is None or isinstance(module.se, nn.Identity)):
            yield module, "se"


def _torchvision_blocks(backbone: nn.Module) -> Iterator[Place]:
    kinds = {torchvision.models.resnet.BasicBlock: "bn2", torchvision.models.resnet.Bottleneck: "bn3"}
    for module in backbone.modules():
        if type(module) in kinds:
            yield module, kinds[type(module)]


def _stages(backbone: nn.Module) -> Iterator[Place]:
    """Find the last layer of every stage: timm lists them; in torchvision the maps shrink after it."""
    if hasattr(backbone, "forward_features"):
        ends = [backbone.get_submodule(info["module"]) for info in getattr(backbone, "feature_info", [])]
        # timm's VGG names the last pooling beside the convolution that it follows.
        ends = [end for end in ends if not isinstance(end, nn.MaxPool2d)]
    else:
        ends = _before_shrinking(backbone)
    names = {id(module): name for name, module in backbone.named_modules()}
    for end in ends:
        owner, _, child = names[id(end)].rpartition(".")
        yield backbone.get_submodule(owner), child


@torch.no_grad()
def _before_shrinking(backbone: nn.Module) -> list[nn.Module]:
    """List the layers of a torchvision trunk before those that shrink the maps, and the last one unless it does."""
    layers: list[nn.Module] = []
    for layer in parts.trunk_of(backbone):
        layers += list(layer) if isinstance(layer, nn.Sequential) else [layer]
    training, found = backbone.training, parts.example_planes(backbone)
    backbone.eval()
    ends: list[nn.Module] = []
    shrinks = False
    for index, layer in enumerate(layers):
        before, found = found, layer(found)
        shrinks = found.shape[2] < before.shape[2] and found.shape[3] < before.shape[3]
        if shrinks and index:
            ends.append(layers[index - 1])
    backbone.train(training)
    return ends if shrinks else [*ends, layers[-1]]


class _Probe(nn.Module):
    """Stands where a gate may go, and notes that maps came by."""

    def __init__(self, passed: dict[_Probe, int]) -> None:
        super().__init__()
        self._passed = passed

    def forward(self, found: Any) -> Any:
        if isinstance(found, torch.Tensor) and found.ndim == 4:
            self._passed.setdefault(self, found.shape[1])
        return found


def _fill(backbone: nn.Module, places: list[Place], gate_of: Callable[[int], nn.Module]) -> list[nn.Module]:
    """Put gates into those of the places that maps pass: a probe in each tells, and counts the channels."""
    passed: dict[_Probe, int] = {}
    probes = {_Probe(passed): (owner, name, getattr(owner, name)) for owner, name in places}
    for probe, (owner, name, child) in probes.items():
        setattr(owner, name, _after(child, probe))
    training = backbone.training
    try:
        with torch.no_grad():
            parts.maps(backbone.eval(), parts.example_planes(backbone))
    finally:
        backbone.train(training)
        for owner, name, child in probes.values():
            setattr(owner, name, child)
    gates: list[nn.Module] = []
    for probe, channels in passed.items():
        owner, name, child = probes[probe]
        gates.append(gate_of(channels))
        setattr(owner, name, _after(child, gates[-1]))
    return gates


def _after(child: nn.Module | None, gate: nn.Module) -> nn.Module:
    return gate if child is None or isinstance(child, nn.Identity) else nn.Sequential(child, gate)


class SENet(Network):
    """A backbone with squeeze-and-excitation gates.

    Raises:
        WeightsError: the backbone has no place for them.
    """

    summary = "squeeze-and-excitation gates on the channels of every residual block or stage"
    paper = "Hu et al. 2018"
    Options: ClassVar[type[msgspec.Struct]] = GateOptions
    gate: ClassVar[Callable[[int, int], nn.Module]] = staticmethod(squeeze_excite)
    """(channels, reduction) → module."""

    def __init__(self, backbone: nn.Module, mean: Triple, std: Triple, options: msgspec.Struct | None = None) -> None:
        super().__init__(backbone, mean, std, options)
        reduction = cast(GateOptions, self.options).reduction
        # A tuple, which torch does not register: the gates are modules of the backbone already.
        self.gates = tuple(insert_gates(backbone, lambda channels: type(self).gate(channels, reduction)))

    def new_modules(self) -> list[nn.Module]:
        """List the gates and the classifier."""
        return [*self.gates, *super().new_modules()]


class CBAMNet(SENet):
    """A backbone with convolutional block attention. Raises as `SENet`."""

    summary = "gates on the channels and then the positions of every residual block or stage"
    paper = "Woo et al. 2018"
    gate: ClassVar[Callable[[int, int], nn.Module]] = staticmethod(cbam)

    def attention(self, images: torch.Tensor) -> Attention:
        """Return the last gate's map of the positions."""
        spatial = self.gates[-1].get_submodule("spatial.gate")
        seen: list[torch.Tensor] = []
        handle = spatial.register_forward_hook(lambda _, inputs, output: seen.append(output))
        try:
            with torch.no_grad():
                self(images)
        finally:
            handle.remove()
        return Attention(scaled(seen[-1]), None)
