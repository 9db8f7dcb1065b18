"""B-CNN: a linear classifier on the outer product of two streams' feature maps, pooled over all positions.

Lin, RoyChowdhury & Maji 2015, "Bilinear CNN Models for Fine-Grained Visual Recognition"; compact pooling: Gao,
Beijbom, Zhang & Darrell 2016, "Compact Bilinear Pooling".

The papers train the new classifier first, and then the whole network (``freeze_epochs``). The input of the classifier
is normalised to length 1. With SGD it therefore needs a far higher learning rate than the rest (``head_lr_ratio``); the
paper's is 1.0.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, cast

import msgspec
import numpy as np
import torch
from msgspec import Meta
from torch import nn
from torch.nn import functional as F

from edgefg.errors import DataError
from edgefg.training.models import backbone as backbones
from edgefg.training.models.backbone import Triple
from edgefg.training.models.network import (
    Attention,
    Batch,
    Criterion,
    Network,
    Step,
    class_activation,
    full_precision,
)

# The largest classifier of the paper, 512 × 512 products for 200 classes, has half as many.
_MAX_WEIGHTS = 100_000_000
# Bounds the derivative of the root to 1 / (2 √ε) = 158.
_EPSILON = 1e-5


class BCNNOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of B-CNN."""

    streams: Annotated[
        int,
        Meta(
            description="Streams. 1: outer product of the maps with themselves. 2: with those of a second backbone.",
            ge=1,
            le=2,
        ),
    ] = 1
    pooling: Annotated[Literal["full", "compact"], Meta(description="All products, or a random sketch of them.")] = (
        "full"
    )
    projection: Annotated[
        int, Meta(description="Reduce the maps to this many channels first. 0: no reduction.", ge=0)
    ] = 0
    dimensions: Annotated[int, Meta(description="Length of the compact sketch.", ge=1, le=65536)] = 8192
    sketch_seed: Annotated[int, Meta(description="Seed of the compact sketch.", ge=0, lt=2**32)] = 0


def signed_root(z: torch.Tensor) -> torch.Tensor:
    """Return sign(z)·√|z| elementwise, computed as √(relu(z)+ε) − √(relu(−z)+ε), whose derivative is finite at 0."""
    return (F.relu(z) + _EPSILON).sqrt() - (F.relu(-z) + _EPSILON).sqrt()


class FullPooling(nn.Module):
    """Bilinear pooling vec(XYᵀ / HW) of ``float [N, C, h, w]`` and ``float [N, D, h, w]``.

    Args:
        left: C.
        right: D.
    """

    def __init__(self, left: int, right: int) -> None:
        super().__init__()
        self.size = left * right

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return ``float [N, C·D]``, beginning with the products of channel 0 of ``x``."""
        products = torch.bmm(x.flatten(2), y.flatten(2).transpose(1, 2)) / (x.shape[2] * x.shape[3])
        return products.flatten(1)


class CompactPooling(nn.Module):
    """Random Maclaurin sketch of the products (Gao et al. 2016, algorithm 1): mean of (W₁x ∘ W₂y) / √d, Wᵢ of ±1.

    In expectation, inner products of sketches equal those of `FullPooling`'s vectors. Tensor Sketch, the alternative,
    needs a Fourier transform or a scatter, which some engines lack. This sketch needs two matrix products.

    Args:
        left: channels of ``x``.
        right: channels of ``y``.
        size: d.
        seed: seed of W₁ and W₂. They are not stored, but drawn again by NumPy's legacy generator, whose stream is
            frozen (NEP 19).
    """

    first: torch.Tensor
    second: torch.Tensor

    def __init__(self, left: int, right: int, size: int, seed: int) -> None:
        super().__init__()
        self.size = size
        random = np.random.RandomState(seed)
        for name, channels in (("first", left), ("second", right)):
            signs = torch.from_numpy(random.randint(0, 2, (size, channels), np.int8) * 2 - 1)
            self.register_buffer(name, signs.float(), persistent=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return ``float [N, d]`` of ``float [N, C, h, w]`` and ``float [N, D, h, w]``."""
        products = torch.matmul(self.first, x.flatten(2)) * torch.matmul(self.second, y.flatten(2))
        return cast(torch.Tensor, products.mean(dim=2) / self.size**0.5)


class BCNN(Network):
    """Bilinear CNN: z = vec(XYᵀ / HW), sign(z)·√|z|, L2 normalisation, linear.

    With one stream, Y is X (the paper's [D, D]). With two, Y are the maps of a second backbone. Both start with the
    same weights, and diverge because of their different roles in the product.

    Raises:
        DataError: the classifier would have more than 100 million weights.
        WeightsError: the backbone has no feature maps.
    """

    summary = "bilinear pooling: products of all pairs of channels, averaged over the positions"
    paper = "Lin et al. 2015; Gao et al. 2016"
    Options: ClassVar[type[msgspec.Struct]] = BCNNOptions
    advice: ClassVar[str] = "the paper trains the classifier first and then the whole network: --freeze-epochs"

    def __init__(self, backbone: nn.Module, mean: Triple, std: Triple, options: msgspec.Struct | None = None) -> None:
        classes, channels = backbones.classes_of(backbone), backbones.channels(backbone)
        super().__init__(backbones.without_head(backbone), mean, std, options)
        chosen = cast(BCNNOptions, self.options)
        width = chosen.projection or channels
        streams = range(chosen.streams)
        self.second = copy.deepcopy(self.backbone) if chosen.streams == 2 else None
        self.projections = nn.ModuleList(
            nn.Conv2d(channels, width, 1, bias=False) if chosen.projection else nn.Identity() for _ in streams
        )
        self.pooling: FullPooling | CompactPooling
        if chosen.pooling == "full":
            _check_size(width, classes)
            self.pooling = FullPooling(width, width)
        else:
            self.pooling = CompactPooling(width, width, chosen.dimensions, chosen.sketch_seed)
        self.head = nn.Linear(self.pooling.size, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits of a batch."""
        return cast(torch.Tensor, self.head(self.features(images)))

    def logits_and_maps(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits and the last maps of the first stream."""
        x, y = self._maps(images)
        return self.head(self._embed(x, y)), x

    def loss(self, batch: Batch, criterion: Criterion) -> Step:
        """Return the classification loss of a batch."""
        embedded = self.features(batch.images)
        logits = cast(torch.Tensor, self.head(embedded))
        return Step(criterion(logits, batch), logits, embedded)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Return the embedding, ``float32 [N, D]`` of length 1, of images."""
        return self._embed(*self._maps(images))

    def attention(self, images: torch.Tensor) -> Attention:
        """Return the class activation map of the predicted class, over the maps of the first stream."""
        x, y = self._maps(images)
        y = y.detach()
        return class_activation(x, lambda maps: self.head(self._embed(maps, maps if self.second is None else y)))

    def new_modules(self) -> Sequence[nn.Module]:
        """List the classifier and the projections."""
        return [self.projections, self.head]

    def _maps(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        planes = self.normalised(images)
        x = backbones.maps(self.backbone, planes)
        return x, x if self.second is None else backbones.maps(self.second, planes)

    def _embed(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        left = self.projections[0](x)
        right = left if self.second is None else self.projections[1](y)
        # In half precision, products of maps overflow, and small ones vanish beside ε.
        with full_precision(x):
            rooted = signed_root(self.pooling(left.float(), right.float()))
            # F.normalize expands to the batch. With a free batch, the exported graph would then compute the shape.
            return cast(torch.Tensor, rooted / rooted.norm(dim=1, keepdim=True).clamp_min(1e-12))


def _check_size(channels: int, classes: int) -> None:
    weights = channels * channels * classes
    if weights > _MAX_WEIGHTS:
        fitting = int((_MAX_WEIGHTS / classes) ** 0.5)
        raise DataError(
            f"full bilinear pooling of {channels} channels for {classes} classes needs {weights / 1e6:.0f} million"
            f" weights, more than {_MAX_WEIGHTS / 1e6:.0f}. Use -o pooling=compact, or -o projection=128 (at most"
            f" {fitting})"
        )
