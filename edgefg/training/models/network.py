"""The network that every method is: uint8 pixels in, logits out, and the four things that the rest asks of a teacher.

Plain fine-tuning is this class itself; every other method is a subclass in a file of its own.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple, cast

import msgspec
import torch
from msgspec.structs import replace
from torch import nn
from torch.nn import functional as F

from edgefg.data import ImageDataset
from edgefg.training.models import backbone as parts
from edgefg.training.models.backbone import Triple


class Batch(NamedTuple):
    """What a training step works on."""

    images: torch.Tensor
    """``uint8 [N, H, W, 3]`` RGB; after mixing, float levels of 0 to 255."""
    labels: torch.Tensor
    """``int64 [N]``; `edgefg.data.split.UNLABELLED` where there is none."""
    targets: torch.Tensor | None = None
    """``float32 [N, classes]``, weights of the classes, where images were mixed; rows sum to 1, but for SnapMix's."""
    boxes: torch.Tensor | None = None
    """``float32 [N, P, 4]``: x0, y0, x1, y1 in pixels of ``images``; NaN where a part is not visible."""
    indices: torch.Tensor | None = None
    """``int64 [N]``: positions in the training split."""


class Step(NamedTuple):
    """What a method makes of a batch in training."""

    loss: torch.Tensor
    """Scalar, every term of the method's own included."""
    logits: torch.Tensor
    """``float [N, classes]`` of the whole image."""
    embedding: torch.Tensor
    """``float [N, D]`` of the whole image: what its classifier reads."""


class Attention(NamedTuple):
    """Where a network looks, for a batch of N images."""

    maps: torch.Tensor | None
    """``float32 [N, M, h, w]``, each map scaled to 0…1. Where there are several, the first is their mean."""
    boxes: torch.Tensor | None
    """``float32 [N, K, 4]``: x0, y0, x1, y1 as shares of width and height; NaN where there is none."""
    names: tuple[str, ...] = ()
    """Of the boxes."""
    strength: torch.Tensor | None = None
    """``float32 [N, M]``: how strongly each of several maps responded before it was scaled."""


# (logits float [N, classes], batch) → scalar
Criterion = Callable[[torch.Tensor, Batch], torch.Tensor]


class NoOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Plain fine-tuning has none."""


class Network(nn.Module):
    """A classifier from ``uint8 [N, H, W, 3]`` RGB to ``float32 [N, classes]`` logits.

    Conversion, layout and normalisation are its first operations, so that an exported graph takes raw pixels and every
    runtime runs the same arithmetic.

    Args:
        backbone: takes normalised ``float32 [N, 3, H, W]``, gives logits.
        mean: per channel, in levels of 0 to 255.
        std: likewise.
        options: the method's, an `Options`; None takes the paper's defaults.
    """

    summary: ClassVar[str] = "plain fine-tuning: the backbone with a new head"
    paper: ClassVar[str] = "Yosinski et al. 2014"
    Options: ClassVar[type[msgspec.Struct]] = NoOptions
    single_pass: ClassVar[bool] = True
    """Whether ``forward`` is one feed-forward graph, which exports by itself."""
    needs_boxes: ClassVar[bool] = False
    """Whether its loss needs the boxes of parts, which mixed images have not."""
    new_module_lr_ratio: ClassVar[float] = 1.0
    """Learning rate that suits ``new_modules()``, relative to a plain new head's; multiplies the config's."""

    advice: ClassVar[str] = ""
    """What of the config the paper sets otherwise than the defaults, for people."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, backbone: nn.Module, mean: Triple, std: Triple, options: msgspec.Struct | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.options = options if options is not None else self.Options()
        # Not part of the state dict: the checkpoint's header holds them.
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    @classmethod
    def prepare(cls, options: msgspec.Struct, data: ImageDataset) -> tuple[msgspec.Struct, ImageDataset]:
        """Complete the options from the data, and keep of the data what the method trains on: here no part boxes.

        Raises:
            DataError: the data lack what the method needs.
        """
        return options, replace(data, parts=(), boxes=None)

    def normalised(self, images: torch.Tensor) -> torch.Tensor:
        """Return what the backbone takes, ``float32 [N, 3, H, W]``, of ``uint8`` or float levels ``[N, H, W, 3]``."""
        # The cast comes first: TensorRT and NNCF want a uint8 input to feed a Cast directly.
        planes = images.float().permute(0, 3, 1, 2)
        return (planes - self.mean) / self.std

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits of a batch, by the method's own multi-pass inference if it has one."""
        return cast(torch.Tensor, self.backbone(self.normalised(images)))

    def loss(self, batch: Batch, criterion: Criterion) -> Step:
        """Return the training loss of a batch; ``criterion`` is the classification loss to use."""
        logits, embedded = parts.logits_and_embedding(self.backbone, self.normalised(batch.images))
        return Step(criterion(logits, batch), logits, embedded)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Return the embedding, ``float32 [N, D]``, of images."""
        return parts.logits_and_embedding(self.backbone, self.normalised(images))[1]

    def logits_and_maps(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits as ``forward`` does, and the backbone's last maps of whole images, ``float [N, C, h, w]``.

        Raises:
            WeightsError: the backbone has no such maps.
        """
        found = parts.maps(self.backbone, self.normalised(images))
        return parts.classify(self.backbone, parts.embedding(self.backbone, found)), found

    def attention(self, images: torch.Tensor) -> Attention:
        """Return where the network looks: here the class activation map of the class it names."""
        found = parts.maps(self.backbone, self.normalised(images))
        return class_activation(found, lambda maps: parts.classify(self.backbone, parts.embedding(self.backbone, maps)))

    def new_modules(self) -> Sequence[nn.Module]:
        """List the modules that start untrained, which learn faster."""
        return [parts.head_of(self.backbone)]

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Prepare for epoch ``epoch`` (from 0) of ``epochs``: a method with a schedule sets what learns."""

    def classifies_in(self, epoch: int, epochs: int) -> bool:
        """Whether classifiers learn in epoch ``epoch`` (from 0) of ``epochs``; early stopping counts no others."""
        return True


def class_activation(found: torch.Tensor, classify: Callable[[torch.Tensor], torch.Tensor]) -> Attention:
    """Return the class activation maps of feature maps ``float [N, C, h, w]`` that ``classify`` turns into logits.

    Grad-CAM (Selvaraju et al. 2017, equations 1 and 2), which for a head on pooled maps is CAM (Zhou et al. 2016).
    """
    with torch.enable_grad():
        found = found.detach().requires_grad_()
        (slope,) = torch.autograd.grad(classify(found).max(dim=1).values.sum(), found)
    activation = F.relu((slope.mean(dim=(2, 3), keepdim=True) * found).sum(dim=1, keepdim=True))
    return Attention(scaled(activation.detach()), None)


def scaled(maps: torch.Tensor) -> torch.Tensor:
    """Scale every map of ``[N, M, h, w]`` to 0…1; a constant one becomes 0."""
    low, high = maps.amin(dim=(2, 3), keepdim=True), maps.amax(dim=(2, 3), keepdim=True)
    return ((maps - low) / (high - low).clamp_min(1e-12)).float()


def full_precision(like: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Leave mixed precision on the device of ``like`` for a while; inputs are to be made float32 by the caller."""
    kind = like.device.type
    # Only where it is on, since the exporter does not take the context.
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def mean_logits(passes: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return logits whose softmax is the mean of the softmaxes of ``passes``, each ``float [N, classes]``."""
    return torch.stack([logits.float().log_softmax(dim=1) for logits in passes]).logsumexp(dim=0) - math.log(
        len(passes)
    )
