"""Backbones: any timm or torchvision classifier, built, and taken apart into maps, embedding and logits.

For every convolutional one ``classify(b, embedding(b, maps(b, x)))`` equals ``b(x)``.
"""

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


def logits_and_embedding(backbone: nn.Module, planes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits and what the head read, ``float [N, D]``, of any classifier, transformers included."""
    read: list[torch.Tensor] = []
    handle = head_of(backbone).register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    try:
        logits = cast(torch.Tensor, backbone(planes))
    finally:
        handle.remove()
    return logits, read[-1].flatten(1)


def maps(backbone: nn.Module, planes: torch.Tensor) -> torch.Tensor:
    """Return the last feature maps, ``float [N, C, h, w]``, of normalised planes ``float [N, 3, H, W]``.

    Raises:
        WeightsError: the backbone has no such maps (a transformer).
    """
    if hasattr(backbone, "forward_features"):
        found = cast(torch.Tensor, cast(Any, backbone).forward_features(planes))
    else:
        trunk, _ = _torchvision_parts(backbone)
        found = cast(torch.Tensor, trunk(planes))
    if found.ndim != 4 or str(getattr(backbone, "output_fmt", "NCHW")).endswith("NHWC"):
        raise WeightsError(
            f"{type(backbone).__name__} gives features of shape {tuple(found.shape)}, not [N, C, h, w]; this needs a"
            " convolutional backbone"
        )
    return found


def embedding(backbone: nn.Module, found: torch.Tensor) -> torch.Tensor:
    """Return what the head reads, ``float [N, D]``, of the maps; dropout included in training."""
    if hasattr(backbone, "forward_head"):
        return cast(torch.Tensor, cast(Any, backbone).forward_head(found, pre_logits=True)).flatten(1)
    _, rest = _torchvision_parts(backbone)
    head = head_of(backbone)
    for layer in rest:
        if layer is head:
            break
        found = layer(found)
    return found.flatten(1)


def classify(backbone: nn.Module, embedded: torch.Tensor) -> torch.Tensor:
    """Return the logits, ``float [N, classes]``, of `embedding`'s vectors."""
    head = head_of(backbone)
    if isinstance(head, nn.Conv2d):
        embedded = embedded[:, :, None, None]
    return cast(torch.Tensor, head(embedded)).flatten(1)


def channels(backbone: nn.Module) -> int:
    """Return the number of channels of `maps`."""
    if hasattr(backbone, "forward_features"):
        return int(cast(Any, backbone).num_features)
    trunk, _ = _torchvision_parts(backbone)
    widths = [m.out_channels for m in trunk.modules() if isinstance(m, nn.Conv2d)]
    norms = [m.num_features for m in trunk.modules() if isinstance(m, nn.BatchNorm2d)]
    # DenseNet concatenates: its last norm is wider than its last convolution.
    return max(widths[-1], norms[-1] if norms else 0)


def classes_of(backbone: nn.Module) -> int:
    """Return the number of outputs."""
    head = cast(Any, head_of(backbone))
    return int(head.out_features if isinstance(head, nn.Linear) else head.out_channels)


def _torchvision_parts(backbone: nn.Module) -> tuple[nn.Sequential, list[nn.Module]]:
    """Split a torchvision classifier before its global pooling: the trunk, and the layers from the pooling on."""
    layers: list[nn.Module] = []
    children = dict(backbone.named_children())
    for name, child in children.items():
        layers += list(child) if name in ("classifier", "fc") and isinstance(child, nn.Sequential) else [child]
    first_of_rest = next((i for i, layer in enumerate(layers) if isinstance(layer, nn.AdaptiveAvgPool2d)), len(layers))
    head = head_of(backbone)
    if first_of_rest == len(layers):  # MobileNetV2, DenseNet: pooled inside forward, right after the features
        first_of_rest = next(i for i, layer in enumerate(layers) if not isinstance(layer, nn.Sequential))
        pool: list[nn.Module] = [nn.AdaptiveAvgPool2d(1)]
        if type(backbone).__name__ == "DenseNet":
            pool.insert(0, nn.ReLU())
        rest = [*pool, nn.Flatten(1), *layers[first_of_rest:]]
    else:
        rest = [layers[first_of_rest], nn.Flatten(1), *layers[first_of_rest + 1 :]]
    if not any(layer is head for layer in rest):
        raise WeightsError(f"{type(backbone).__name__} is not taken apart into maps and a head; use a timm backbone")
    return nn.Sequential(*layers[:first_of_rest]), rest
