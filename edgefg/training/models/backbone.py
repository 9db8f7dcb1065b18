"""Backbones: any classifier of timm or torchvision, and its feature maps, embedding and logits.

For every convolutional backbone, ``classify(b, embedding(b, maps(b, x)))`` equals ``b(x)``.
"""

from __future__ import annotations

import difflib
import math
from typing import Any, cast

import timm
import torch
import torchvision
from torch import nn

from edgefg.errors import WeightsError

IMAGENET_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
IMAGENET_STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)
Triple = tuple[float, float, float]
# torchvision's ports from TensorFlow, whose weights expect inputs of -1…1.
_SCALED_INSIDE = ("googlenet", "inception_v3")


def build_backbone(name: str, classes: int) -> nn.Module:
    """Build an untrained timm or torchvision classifier with ``classes`` outputs.

    Args:
        name: a timm name, or a torchvision name that timm does not have. ``torchvision:NAME`` is always torchvision's.
        classes: number of outputs.

    Raises:
        WeightsError: neither library has such a backbone.
    """
    if not name.startswith("torchvision:") and timm.is_model(name):
        return cast(nn.Module, timm.create_model(name, pretrained=False, num_classes=classes))
    plain = name.removeprefix("torchvision:")
    if plain in torchvision.models.list_models(torchvision.models):
        # By default, these two return tuples in training.
        extra = {"aux_logits": False, "init_weights": True} if plain in _SCALED_INSIDE else {}
        backbone = cast(nn.Module, torchvision.models.get_model(plain, weights=None, num_classes=classes, **extra))
        backbone.pretrained_cfg = _published(plain)  # type: ignore[assignment]
        return backbone
    known = [*timm.list_models(), *torchvision.models.list_models(torchvision.models)]
    close = difflib.get_close_matches(plain, known, n=5)
    hint = f"; similar names: {', '.join(close)}" if close else ""
    raise WeightsError(f"no backbone is called {name!r} in timm or torchvision{hint}")


def _published(name: str) -> dict[str, Any]:
    """Return the normalisation of torchvision's published weights, in timm's format."""
    found = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    # For these, torchvision converts the input inside the network (transform_input). The normalisation does it here.
    scaled = name in _SCALED_INSIDE
    return {"mean": (0.5,) * 3, "std": (0.5,) * 3} if scaled else {"mean": tuple(found.mean), "std": tuple(found.std)}


def head_of(backbone: nn.Module) -> nn.Module:
    """Return the classifier: timm names it, and in torchvision it is the last layer with weights.

    Raises:
        WeightsError: there are several, as in networks designed for distillation.
    """
    if hasattr(backbone, "get_classifier"):
        head = cast(Any, backbone).get_classifier()
        if not isinstance(head, nn.Module):
            raise WeightsError(f"{type(backbone).__name__} has {len(head)} classifiers. Use a backbone with one")
        return head
    return [module for module in backbone.modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1]


def default_normalisation(backbone: nn.Module) -> tuple[Triple, Triple]:
    """Return the mean and the standard deviation, in levels, of the input that the published weights expect."""
    config = cast(Any, backbone).pretrained_cfg
    mean, std = (tuple(255.0 * value for value in config[key]) for key in ("mean", "std"))
    return cast(Triple, mean), cast(Triple, std)


def logits_and_embedding(backbone: nn.Module, planes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits and the embedding, the input of the head ``float [N, D]``. Works for transformers too."""
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
        WeightsError: the backbone has none (a transformer).
    """
    if hasattr(backbone, "forward_features"):
        found = cast(Any, backbone).forward_features(planes)
    else:
        found = trunk_of(backbone)(planes)
    is_map = isinstance(found, torch.Tensor) and found.ndim == 4
    if not is_map or str(getattr(backbone, "output_fmt", "NCHW")).endswith("NHWC"):
        shape = tuple(found.shape) if isinstance(found, torch.Tensor) else f"{type(found).__name__} of tensors"
        raise WeightsError(
            f"{type(backbone).__name__} has features of shape {shape}, not [N, C, h, w]. Use a convolutional backbone"
        )
    return cast(torch.Tensor, found)


def embedding(backbone: nn.Module, found: torch.Tensor) -> torch.Tensor:
    """Return the embedding, the input of the head ``float [N, D]``, of feature maps. Training includes dropout."""
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
    """Return the logits, ``float [N, classes]``, of embeddings."""
    head = head_of(backbone)
    if isinstance(head, nn.Conv2d):
        embedded = embedded[:, :, None, None]
    return cast(torch.Tensor, head(embedded)).flatten(1)


def channels(backbone: nn.Module) -> int:
    """Return the number of channels of `maps`."""
    if hasattr(backbone, "forward_features"):
        return int(cast(Any, backbone).num_features)
    _, rest = _torchvision_parts(backbone)
    first = next(layer for layer in rest if isinstance(layer, nn.Linear))
    pool = next(layer for layer in rest if isinstance(layer, nn.AdaptiveAvgPool2d))
    positions = pool.output_size if isinstance(pool.output_size, tuple) else (pool.output_size,) * 2
    return first.in_features // int(math.prod(cast(tuple[int, int], positions)))


def example_planes(backbone: nn.Module) -> torch.Tensor:
    """Return zeros, ``float32 [1, 3, S, S]``, as an example input: 96 px, unless the backbone has a fixed size."""
    config = getattr(backbone, "pretrained_cfg", None) or {}
    side = config["input_size"][-1] if config.get("fixed_input_size") else 96
    return torch.zeros(1, 3, side, side, device=next(backbone.parameters()).device)


def trunk_of(backbone: nn.Module) -> nn.Sequential:
    """Return the layers of a torchvision classifier up to its `maps`. A trunk is returned as it is."""
    return backbone if isinstance(backbone, nn.Sequential) else _torchvision_parts(backbone)[0]


def without_head(backbone: nn.Module) -> nn.Module:
    """Return a backbone without the layers behind its `maps`. Those of timm are changed in place.

    Raises:
        WeightsError: the backbone has no feature maps.
    """
    if not hasattr(backbone, "forward_features"):
        return trunk_of(backbone)
    # Autograd shows which layers the maps depend on: heads have many names in timm (VGG: pre_logits, then head).
    parameters = list(backbone.parameters())
    training = backbone.training
    backbone.eval()  # the example must not change the statistics of the norms
    with torch.enable_grad():
        total = maps(backbone, example_planes(backbone)).sum()
    backbone.train(training)
    slopes = torch.autograd.grad(total, parameters, allow_unused=True)
    used = {id(parameter) for parameter, slope in zip(parameters, slopes, strict=True) if slope is not None}
    for name, child in list(backbone.named_children()):
        own = {id(parameter) for parameter in child.parameters()}
        if own and not own & used:
            setattr(backbone, name, nn.Identity())
    return backbone


def classes_of(backbone: nn.Module) -> int:
    """Return the number of outputs."""
    head = cast(Any, head_of(backbone))
    return int(head.out_features if isinstance(head, nn.Linear) else head.out_channels)


def _torchvision_parts(backbone: nn.Module) -> tuple[nn.Sequential, list[nn.Module]]:
    """Split a torchvision classifier at its global pooling, which is the first layer of the second part."""
    layers: list[nn.Module] = []
    trunk_length = 0
    for name, child in backbone.named_children():
        last = name in ("classifier", "fc", "head")
        is_list = isinstance(child, nn.ModuleList) or (last and isinstance(child, nn.Sequential))
        layers += list(cast(nn.Sequential, child)) if is_list else [child]
        trunk_length = trunk_length if last else len(layers)
    pools = [i for i, layer in enumerate(layers) if isinstance(layer, nn.AdaptiveAvgPool2d)]
    rest = layers[pools[0] :] if pools else [nn.AdaptiveAvgPool2d(1), *layers[trunk_length:]]
    if not pools and isinstance(backbone, torchvision.models.DenseNet):
        rest.insert(0, nn.ReLU())  # applied in forward, like the pooling
    first = next((i for i, layer in enumerate(rest) if isinstance(layer, nn.Linear)), len(rest))
    rest.insert(first, nn.Flatten(1))
    head = head_of(backbone)
    if not any(layer is head for layer in rest):
        raise WeightsError(
            f"the head of {type(backbone).__name__} does not follow a global pooling. Use a convolutional backbone with"
            " a linear head after the pooling, for instance resnet50"
        )
    return nn.Sequential(*layers[: pools[0] if pools else trunk_length]), rest
