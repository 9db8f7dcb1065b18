"""Mixing of pairs of images: MixUp, CutMix and SnapMix.

Each image is mixed with the one before it in the batch, whose order is random. Random numbers come from torch's global
generator, which the training loop seeds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import v2

from edgefg.errors import TrainingError, WeightsError
from edgefg.settings.training import Augmentation
from edgefg.training.models import backbone as backbones
from edgefg.training.models.network import Batch, Network

# (network, batch) → batch with soft targets and without boxes, or the batch itself if it is not mixed.
Mixer = Callable[[nn.Module, Batch], Batch]
# x0, y0, x1, y1 in pixels.
Box = tuple[int, int, int, int]


def create_mixer(augmentation: Augmentation, network: nn.Module, classes: int) -> Mixer | None:
    """Create the function that mixes the images of a batch; None for ``mix="none"``.

    Args:
        augmentation: ``mix``, ``mix_alpha`` and ``mix_share`` are used.
        network: the network to train. SnapMix uses its class activation maps.
        classes: number of classes.

    Raises:
        TrainingError: SnapMix is chosen, and the backbone is not a complete convolutional classifier.
    """
    mix: Mixer
    if augmentation.mix == "none":
        return None
    if augmentation.mix == "snapmix":
        _check_activation(network, classes)
        mix = SnapMix(augmentation.mix_alpha, classes)
    else:
        kind = v2.MixUp if augmentation.mix == "mixup" else v2.CutMix
        mix = _mixer_by(kind(alpha=augmentation.mix_alpha, num_classes=classes))

    def sometimes(network: nn.Module, batch: Batch) -> Batch:
        return mix(network, batch) if torch.rand(()).item() < augmentation.mix_share else batch

    return sometimes


def _mixer_by(transform: v2.Transform) -> Mixer:
    """Mix with torchvision's MixUp (Zhang et al. 2018) or CutMix (Yun et al. 2019)."""

    def mix(_: nn.Module, batch: Batch) -> Batch:
        planes, targets = transform(batch.images.permute(0, 3, 1, 2).float(), batch.labels)
        return batch._replace(images=planes.permute(0, 2, 3, 1), targets=targets, boxes=None)

    return mix


class SnapMix:
    """Semantically proportional mixing (Huang et al. 2021): a box of one image is resized and pasted into another.

    Both boxes are drawn independently. The soft targets follow from the class activation inside them.

    Args:
        alpha: α of the Beta(α, α) distribution of each box's area. The paper uses 5.
        classes: number of classes.
    """

    def __init__(self, alpha: float, classes: int) -> None:
        self._classes = classes
        self._draw = v2.CutMix(alpha=alpha, num_classes=classes)

    def __call__(self, network: nn.Module, batch: Batch) -> Batch:
        """Mix a batch. It is returned unchanged if one of the boxes is empty."""
        planes = batch.images.permute(0, 3, 1, 2).float()
        into, source = (cast(Box, self._draw.make_params([planes])["box"]) for _ in range(2))
        if not _area(into) or not _area(source):
            return batch
        shares = semantic_shares(network, batch.images, batch.labels)
        return batch._replace(
            images=paste(planes, into, source).permute(0, 2, 3, 1),
            targets=semantic_targets(shares, batch.labels, self._classes, into, source),
            boxes=None,
        )


def paste(planes: torch.Tensor, into: Box, source: Box) -> torch.Tensor:
    """Resize ``source`` of each preceding image, and paste it into ``into`` of the image, ``float [N, C, H, W]``."""
    x0, y0, x1, y1 = source
    part = planes.roll(1, 0)[..., y0:y1, x0:x1]
    x0, y0, x1, y1 = into
    mixed = planes.clone()
    mixed[..., y0:y1, x0:x1] = F.interpolate(part, (y1 - y0, x1 - x0), mode="bilinear", antialias=True)
    return mixed


def semantic_targets(shares: torch.Tensor, labels: torch.Tensor, classes: int, into: Box, source: Box) -> torch.Tensor:
    """Return the soft targets of SnapMix, ``float32 [N, classes]``. Rows need not sum to 1.

    ρ_a = 1 − Σ_into S(a) and ρ_b = Σ_source S(b) (equations 3 and 4): if background is pasted
    over a bird, both are small. Two images of one class add up to ρ_a + ρ_b. (The authors' code uses twice that, unlike
    the paper.)

    Args:
        shares: S, see `semantic_shares`.
        labels: ``int64 [N]``.
        classes: number of classes.
        into: the box that is replaced.
        source: the box of the preceding image.
    """
    own = F.one_hot(labels, classes).float()
    left, added = 1 - _inside(shares, into), _inside(shares, source)
    return left[:, None] * own + (added[:, None] * own).roll(1, 0)


def semantic_shares(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the semantic percentage maps, ``float32 [N, H, W]``: class activation, normalised to sum 1 (eq. 1, 2).

    The maps are those of the image's class by Grad-CAM (Selvaraju et al. 2017), which equals the paper's CAM for a head
    on pooled maps. The network is evaluated in evaluation mode, and its modes and norms do not change. A constant map
    gives all pixels the same weight.

    Args:
        network: a `Network` whose backbone is a complete convolutional classifier.
        images: ``[N, H, W, 3]``, levels.
        labels: ``int64 [N]``.
    """
    model = cast(Any, network)  # the network may be wrapped by Fabric
    backbone: nn.Module = model.backbone
    with evaluating(backbone):
        with torch.no_grad():
            found = backbones.maps(backbone, model.normalised(images))
        found = found.detach().requires_grad_()
        logits = backbones.classify(backbone, backbones.embedding(backbone, found))
        (slope,) = torch.autograd.grad(logits.gather(1, labels[:, None]).sum(), found)
    activation = (slope.mean(dim=(2, 3), keepdim=True) * found.detach()).sum(dim=1, keepdim=True).float()
    full = F.interpolate(activation, images.shape[1:3], mode="bilinear")[:, 0]
    full = full - full.amin(dim=(1, 2), keepdim=True)
    total = full.sum(dim=(1, 2), keepdim=True)
    return torch.where(total > 0, full / total, 1 / full[0].numel())


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Set a module to evaluation mode; afterwards every part has its own mode again, frozen norms included."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def _check_activation(network: nn.Module, classes: int) -> None:
    """Raise `TrainingError` unless the logits follow from the backbone's feature maps."""
    backbone: nn.Module = cast(Network, network).backbone
    try:
        with evaluating(backbone), torch.no_grad():
            found = backbones.maps(backbone, backbones.example_planes(backbone))
            outputs = backbones.classify(backbone, backbones.embedding(backbone, found)).shape[1]
        wrong = f"it has {outputs} outputs for {classes} classes" if outputs != classes else ""
    except (WeightsError, RuntimeError) as exc:
        wrong = str(exc).splitlines()[0]
    if wrong:
        raise TrainingError(
            f"snapmix needs a backbone that is a complete convolutional classifier, but that of"
            f" {type(network).__name__} is not ({wrong}). Use --mix cutmix, or --method plain with a convolutional"
            " backbone"
        )


def _area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def _inside(shares: torch.Tensor, box: Box) -> torch.Tensor:
    """Return the sum of each map inside a box, ``float [N]``."""
    x0, y0, x1, y1 = box
    return shares[:, y0:y1, x0:x1].sum(dim=(1, 2))
