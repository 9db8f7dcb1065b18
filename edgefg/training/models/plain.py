"""Plain fine-tuning: any timm or torchvision classifier with a new head, behind the uint8 input of the project."""

from __future__ import annotations

import difflib
from typing import Any, cast

import timm
import torch
import torchvision
from torch import nn

from edgefg.errors import WeightsError

IMAGENET_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
IMAGENET_STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)
Triple = tuple[float, float, float]


class Network(nn.Module):
    """A classifier from ``uint8 [N, H, W, 3]`` RGB to ``float32 [N, classes]`` logits.

    Conversion, layout and normalisation are its first operations, so that an exported graph takes raw pixels and every
    runtime runs the same arithmetic.

    Args:
        backbone: takes normalised ``float32 [N, 3, H, W]``, gives logits.
        mean: per channel, in levels of 0 to 255.
        std: likewise.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, backbone: nn.Module, mean: Triple, std: Triple) -> None:
        super().__init__()
        self.backbone = backbone
        # Not part of the state dict: the checkpoint's header holds them.
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits of a batch."""
        # The cast comes first: TensorRT and NNCF want a uint8 input to feed a Cast directly.
        planes = images.float().permute(0, 3, 1, 2)
        return cast(torch.Tensor, self.backbone((planes - self.mean) / self.std))


def build_backbone(name: str, classes: int) -> nn.Module:
    """Build an untrained timm or torchvision classifier with ``classes`` outputs.

    Args:
        name: a timm name, or a torchvision name where timm has none; ``torchvision:NAME`` asks for torchvision's.
        classes: number of outputs.

    Raises:
        WeightsError: neither library has it.
    """
    if not name.startswith("torchvision:") and timm.is_model(name):
        return cast(nn.Module, timm.create_model(name, pretrained=False, num_classes=classes))
    plain = name.removeprefix("torchvision:")
    if plain in torchvision.models.list_models(torchvision.models):
        # These two give tuples in training unless told not to.
        extra = {"aux_logits": False, "init_weights": True} if plain in ("googlenet", "inception_v3") else {}
        return cast(nn.Module, torchvision.models.get_model(plain, weights=None, num_classes=classes, **extra))
    known = [*timm.list_models(), *torchvision.models.list_models(torchvision.models)]
    close = difflib.get_close_matches(plain, known, n=5)
    hint = f"; similar names: {', '.join(close)}" if close else ""
    raise WeightsError(f"no backbone is called {name!r} in timm or torchvision{hint}")


def head_of(backbone: nn.Module) -> nn.Module:
    """Return the layer that gives the logits: timm says so; in torchvision it is the last one with weights."""
    if hasattr(backbone, "get_classifier"):
        return cast(nn.Module, cast(Any, backbone).get_classifier())
    return [module for module in backbone.modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1]


def default_normalisation(backbone: nn.Module) -> tuple[Triple, Triple]:
    """Return mean and standard deviation, in levels, that the backbone's published weights were trained with."""
    config = getattr(backbone, "pretrained_cfg", None)
    if not config:
        return IMAGENET_MEAN, IMAGENET_STD
    mean, std = (tuple(255.0 * value for value in config[key]) for key in ("mean", "std"))
    return cast(Triple, mean), cast(Triple, std)
