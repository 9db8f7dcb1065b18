"""The base class of all methods: a network from uint8 pixels to logits.

Plain fine-tuning is this class itself. Every other method is a subclass in a file of its own.
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
from edgefg.training.models import backbone as backbones
from edgefg.training.models.backbone import Triple


class Batch(NamedTuple):
    """Input of a training step."""

    images: torch.Tensor
    """``uint8 [N, H, W, 3]`` RGB; after mixing, float levels of 0 to 255."""
    labels: torch.Tensor
    """``int64 [N]``. `edgefg.data.split.UNLABELLED` marks images without a label."""
    targets: torch.Tensor | None = None
    """Soft targets of mixed images, ``float32 [N, classes]``. Rows sum to 1, except with SnapMix."""
    boxes: torch.Tensor | None = None
    """Boxes of parts, ``float32 [N, P, 4]``: x0, y0, x1, y1 in pixels of ``images``. NaN: the part is not visible."""
    indices: torch.Tensor | None = None
    """``int64 [N]``: positions in the training split."""


class Step(NamedTuple):
    """Output of a training step."""

    loss: torch.Tensor
    """Scalar, with all terms of the method."""
    logits: torch.Tensor
    """``float [N, classes]``, for the whole image."""
    embedding: torch.Tensor
    """Input of the classifier, ``float [N, D]``, for the whole image."""


class Attention(NamedTuple):
    """Where a network looks, for a batch of N images."""

    maps: torch.Tensor | None
    """``float32 [N, M, h, w]``, each map scaled to 0…1. If there are several, the first is their mean."""
    boxes: torch.Tensor | None
    """``float32 [N, K, 4]``: x0, y0, x1, y1 as shares of width and height; NaN: not found."""
    names: tuple[str, ...] = ()
    """Names of the boxes."""
    strength: torch.Tensor | None = None
    """Response of each of several maps before it was scaled, ``float32 [N, M]``."""


# (logits float [N, classes], batch) → scalar
Criterion = Callable[[torch.Tensor, Batch], torch.Tensor]


class NoOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of plain fine-tuning: none."""


class TrainableNetwork(nn.Module):
    """Interface that the training loop uses besides ``forward``, with defaults that suit most networks."""

    forward_methods: ClassVar[tuple[str, ...]] = ()
    """Methods besides ``forward`` that an objective calls. They run in the precision of the training."""
    new_module_lr_ratio: ClassVar[float] = 1.0
    """Learning rate of ``new_modules()``, relative to that of a new linear head."""

    def new_modules(self) -> Sequence[nn.Module]:
        """List the modules that are untrained at the start. They get a higher learning rate."""
        return []

    def layers_root(self) -> nn.Module:
        """Return the module whose children are the blocks that a layer-wise learning rate counts."""
        return self

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Prepare for epoch ``epoch`` (counted from 0) of ``epochs``, for instance choose what is trained in it."""

    def classifies_in(self, epoch: int, epochs: int) -> bool:
        """Whether classifiers are trained in epoch ``epoch`` (counted from 0). Early stopping counts no others."""
        return True


class Network(TrainableNetwork):
    """A classifier from ``uint8 [N, H, W, 3]`` RGB to ``float32 [N, classes]`` logits.

    Conversion, layout and normalisation are its first operations. An exported graph therefore takes raw pixels, and
    every runtime does the same arithmetic.

    Args:
        backbone: takes normalised ``float32 [N, 3, H, W]``, returns logits.
        mean: per channel, in levels of 0 to 255.
        std: per channel, in levels of 0 to 255.
        options: options of the method, an `Options`. None: the paper's.
    """

    summary: ClassVar[str] = "plain fine-tuning: the backbone with a new head"
    paper: ClassVar[str] = "Yosinski et al. 2014"
    Options: ClassVar[type[msgspec.Struct]] = NoOptions
    single_pass: ClassVar[bool] = True
    """Whether ``forward`` is one feed-forward graph, which can be exported."""
    needs_boxes: ClassVar[bool] = False
    """Whether the loss needs boxes of parts, which mixed images do not have."""
    advice: ClassVar[str] = ""
    """Training settings of the paper that differ from the defaults, for people."""
    forward_methods: ClassVar[tuple[str, ...]] = ("loss", "logits_and_maps")

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
        """Complete the options from the data, and reduce the data to what the method is trained on.

        Plain fine-tuning uses no boxes of parts.

        Raises:
            DataError: the data lack what the method needs.
        """
        return options, replace(data, parts=(), boxes=None)

    def normalised(self, images: torch.Tensor) -> torch.Tensor:
        """Return the backbone's input, ``float32 [N, 3, H, W]``, from ``uint8`` or float levels ``[N, H, W, 3]``."""
        # The cast comes first: TensorRT and NNCF want a uint8 input to feed a Cast directly.
        planes = images.float().permute(0, 3, 1, 2)
        return (planes - self.mean) / self.std

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits of a batch. A method with several passes runs all of them."""
        return cast(torch.Tensor, self.backbone(self.normalised(images)))

    def loss(self, batch: Batch, criterion: Criterion) -> Step:
        """Return the training loss of a batch, with ``criterion`` as the classification loss."""
        logits, embedded = backbones.logits_and_embedding(self.backbone, self.normalised(batch.images))
        return Step(criterion(logits, batch), logits, embedded)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Return the embedding of images, ``float32 [N, D]``."""
        return backbones.logits_and_embedding(self.backbone, self.normalised(images))[1]

    def logits_and_maps(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits, and the last feature maps of the backbone for whole images, ``float [N, C, h, w]``.

        Raises:
            WeightsError: the backbone has no feature maps.
        """
        found = backbones.maps(self.backbone, self.normalised(images))
        return backbones.classify(self.backbone, backbones.embedding(self.backbone, found)), found

    def attention(self, images: torch.Tensor) -> Attention:
        """Return where the network looks: here, the class activation map of the predicted class."""
        found = backbones.maps(self.backbone, self.normalised(images))
        return class_activation(
            found, lambda maps: backbones.classify(self.backbone, backbones.embedding(self.backbone, maps))
        )

    def new_modules(self) -> Sequence[nn.Module]:
        """List the modules that are untrained at the start: here, the classifier."""
        return [backbones.head_of(self.backbone)]

    def layers_root(self) -> nn.Module:
        """Return the backbone."""
        return self.backbone


def class_activation(found: torch.Tensor, classify: Callable[[torch.Tensor], torch.Tensor]) -> Attention:
    """Return the class activation map of feature maps ``float [N, C, h, w]``, for the class that ``classify`` predicts.

    Grad-CAM (Selvaraju et al. 2017, equations 1 and 2). For a head on pooled maps it equals CAM (Zhou et al. 2016).
    """
    with torch.enable_grad():
        found = found.detach().requires_grad_()
        (slope,) = torch.autograd.grad(classify(found).max(dim=1).values.sum(), found)
    activation = F.relu((slope.mean(dim=(2, 3), keepdim=True) * found).sum(dim=1, keepdim=True))
    return Attention(scaled(activation.detach()), None)


def scaled(maps: torch.Tensor) -> torch.Tensor:
    """Scale every map of ``[N, M, h, w]`` to 0…1. A constant map becomes 0."""
    low, high = maps.amin(dim=(2, 3), keepdim=True), maps.amax(dim=(2, 3), keepdim=True)
    return ((maps - low) / (high - low).clamp_min(1e-12)).float()


def full_precision(like: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Switch mixed precision off on the device of ``like``. The caller converts inputs to float32."""
    kind = like.device.type
    # Only if it is on: the exporter does not support the context manager.
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def mean_logits(passes: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return logits whose softmax is the mean of the softmaxes of ``passes``, each ``float [N, classes]``."""
    return torch.stack([logits.float().log_softmax(dim=1) for logits in passes]).logsumexp(dim=0) - math.log(
        len(passes)
    )
