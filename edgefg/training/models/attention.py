"""SE and CBAM: attention gates on the feature maps, inserted into a backbone that may be pretrained.

Hu, Shen & Sun 2018, "Squeeze-and-Excitation Networks"; Woo, Park, Lee & Kweon 2018, "CBAM: Convolutional Block
Attention Module". As in the papers, a gate is inserted into every residual block before the addition or, in a backbone
without known blocks, after every stage.

A new gate with random weights would halve every map (σ(0) = 0.5), and so destroy pretrained features. Here gates start
at σ(5) = 0.993 for every input: the last weights are 0 and the bias is 5, where the gradient does not vanish.
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
from edgefg.training.models import backbone as backbones
from edgefg.training.models.backbone import Triple
from edgefg.training.models.network import Attention, Network, scaled

_OPEN = 5.0

# (module, name of its child): a place for a gate
Place = tuple[nn.Module, str]


class GateOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of SE and CBAM."""

    reduction: Annotated[int, Meta(description="Reduction ratio r: channels are squeezed to 1/r.", ge=1)] = 16


def squeeze_excite(channels: int, reduction: int) -> nn.Module:
    """Create an SE gate, which scales channels of ``float [N, C, h, w]`` by s = σ(W₂ relu(W₁ GAP(x)))."""
    gate = cast(nn.Module, create_attn("se", channels, rd_channels=max(1, channels // reduction)))
    _open_last(gate, _OPEN)
    return gate


def cbam(channels: int, reduction: int) -> nn.Module:
    """Create a CBAM gate for ``float [N, C, h, w]``.

    It scales channels by σ(MLP(avg) + MLP(max)), then positions by σ(BN(conv7×7[mean; max])).
    """
    gate = cast(nn.Module, create_attn("cbam", channels, rd_channels=max(1, channels // reduction), mlp_bias=True))
    # The MLP is applied twice, and so is its bias.
    _open_last(gate.get_submodule("channel"), _OPEN / 2)
    # Not the convolution's weights: for a constant input, the gradient of batch normalisation is 1/√ε.
    norm = cast(nn.BatchNorm2d, gate.get_submodule("spatial.conv.bn"))
    nn.init.zeros_(norm.weight)
    nn.init.constant_(norm.bias, _OPEN)
    return gate


def _open_last(gate: nn.Module, bias: float) -> None:
    last = cast(nn.Conv2d, gate.get_submodule("fc2"))
    nn.init.zeros_(last.weight)
    nn.init.constant_(cast(nn.Parameter, last.bias), bias)


def insert_gates(backbone: nn.Module, gate_of: Callable[[int], nn.Module]) -> list[nn.Module]:
    """Insert gates into a backbone in place, and return them in the order of the forward pass.

    They are inserted into the first of these that the backbone has: the free ``se`` slots of timm's residual blocks;
    behind the last norm of torchvision's residual blocks; behind every stage. Existing gates are kept.

    Args:
        backbone: a timm or torchvision classifier.
        gate_of: creates a gate for a number of channels.

    Raises:
        WeightsError: the backbone has no feature maps, or no place for gates.
    """
    for places in (_slots, _torchvision_blocks, _stages):
        gates = _fill(backbone, list(places(backbone)), gate_of)
        if gates:
            return gates
    raise WeightsError(
        f"{type(backbone).__name__} has no residual blocks or stages for gates. Use a convolutional backbone, for"
        " instance resnet50"
    )


def _slots(backbone: nn.Module) -> Iterator[Place]:
    """Find the free attention slots of timm's blocks: None in ResNets, an identity in MBConv and RegNet."""
    for module in backbone.modules():
        if hasattr(module, "se") and (module.se is None or isinstance(module.se, nn.Identity)):
            yield module, "se"


def _torchvision_blocks(backbone: nn.Module) -> Iterator[Place]:
    kinds = {torchvision.models.resnet.BasicBlock: "bn2", torchvision.models.resnet.Bottleneck: "bn3"}
    for module in backbone.modules():
        if type(module) in kinds:
            yield module, kinds[type(module)]


def _stages(backbone: nn.Module) -> Iterator[Place]:
    """Find the last layer of every stage. timm lists them; in torchvision the next layer shrinks the maps."""
    if hasattr(backbone, "forward_features"):
        ends = [backbone.get_submodule(info["module"]) for info in getattr(backbone, "feature_info", [])]
        # For VGG, timm lists the last pooling besides the convolution before it.
        ends = [end for end in ends if not isinstance(end, nn.MaxPool2d)]
    else:
        ends = _before_shrinking(backbone)
    names = {id(module): name for name, module in backbone.named_modules()}
    for end in ends:
        owner, _, child = names[id(end)].rpartition(".")
        yield backbone.get_submodule(owner), child


@torch.no_grad()
def _before_shrinking(backbone: nn.Module) -> list[nn.Module]:
    """List the layers of a torchvision trunk after which the maps shrink, and the last one unless it shrinks them."""
    layers: list[nn.Module] = []
    for layer in backbones.trunk_of(backbone):
        layers += list(layer) if isinstance(layer, nn.Sequential) else [layer]
    training, found = backbone.training, backbones.example_planes(backbone)
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
    """Stands in for a gate, and records the channels of the maps that it receives."""

    def __init__(self, passed: dict[_Probe, int]) -> None:
        super().__init__()
        self._passed = passed

    def forward(self, found: Any) -> Any:
        if isinstance(found, torch.Tensor) and found.ndim == 4:
            self._passed.setdefault(self, found.shape[1])
        return found


def _fill(backbone: nn.Module, places: list[Place], gate_of: Callable[[int], nn.Module]) -> list[nn.Module]:
    """Insert gates into those places that receive feature maps, which a probe in each place finds out."""
    passed: dict[_Probe, int] = {}
    probes = {_Probe(passed): (owner, name, getattr(owner, name)) for owner, name in places}
    for probe, (owner, name, child) in probes.items():
        setattr(owner, name, _after(child, probe))
    training = backbone.training
    try:
        with torch.no_grad():
            backbones.maps(backbone.eval(), backbones.example_planes(backbone))
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
        # torch does not register the modules of a tuple: the gates are registered in the backbone.
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
        """Return the spatial map of the last gate."""
        spatial = self.gates[-1].get_submodule("spatial.gate")
        seen: list[torch.Tensor] = []
        handle = spatial.register_forward_hook(lambda _, inputs, output: seen.append(output))
        try:
            with torch.no_grad():
                self(images)
        finally:
            handle.remove()
        return Attention(scaled(seen[-1]), None)
