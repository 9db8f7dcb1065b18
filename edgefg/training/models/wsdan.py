"""WS-DAN: attention maps, learned from the labels only, pool the features, and guide crops and drops of the image.

Hu, Qi, Huang & Lu 2019, "See Better Before Looking Closer: Weakly Supervised Data Augmentation Network for Fine-Grained
Visual Classification". Sections are the paper's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, ClassVar, NamedTuple, cast

import msgspec
import torch
from msgspec import Meta
from torch import nn
from torch.nn import functional as F

from edgefg.training.models import backbone as backbones
from edgefg.training.models.backbone import Triple
from edgefg.training.models.bcnn import signed_root
from edgefg.training.models.network import (
    Attention,
    Batch,
    Criterion,
    Network,
    Step,
    full_precision,
    mean_logits,
    scaled,
)

# Scales the normalised vector, so that logits can be far apart with an ordinary learning rate.
_SCALE = 100.0


class WSDANOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of WS-DAN. Thresholds are relative to the maximum of a map, paddings to the side of the image."""

    maps: Annotated[int, Meta(description="Number of attention maps, M.", ge=1)] = 32
    crop_low: Annotated[float, Meta(description="Lowest threshold of the training crop.", ge=0, lt=1)] = 0.4
    crop_high: Annotated[float, Meta(description="Highest threshold of the training crop.", ge=0, lt=1)] = 0.6
    crop_padding: Annotated[float, Meta(description="Padding on each side of the training crop.", ge=0, lt=1)] = 0.1
    drop_low: Annotated[float, Meta(description="Lowest threshold of the dropped region.", ge=0, lt=1)] = 0.2
    drop_high: Annotated[float, Meta(description="Highest threshold of the dropped region.", ge=0, lt=1)] = 0.5
    beta: Annotated[float, Meta(description="Update rate of the class centres.", gt=0, le=1)] = 0.05
    centre_weight: Annotated[float, Meta(description="Weight of the centre regularisation. 0: none.", ge=0)] = 1.0
    passes: Annotated[
        int, Meta(description="Passes of a prediction. 1: the image. 2: the image and its crop.", ge=1, le=2)
    ] = 2
    test_threshold: Annotated[float, Meta(description="Threshold of the crop in a prediction.", ge=0, lt=1)] = 0.1
    test_padding: Annotated[
        float, Meta(description="Padding on each side of the crop in a prediction.", ge=0, lt=1)
    ] = 0.05

    def __post_init__(self) -> None:
        for name, low, high in (("crop", self.crop_low, self.crop_high), ("drop", self.drop_low, self.drop_high)):
            if low > high:
                raise ValueError(f"{name}_low {low} is greater than {name}_high {high}")


def attention_pooling(attention: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Return AᵀX / HW, ``float [N, M, C]``: for each attention map, the weighted mean of the features (section 3.1).

    Args:
        attention: A, ``float [N, M, h, w]``.
        found: X, ``float [N, C, h, w]``.
    """
    # Divided first: the sum over all positions could overflow in half precision.
    shares = attention.flatten(2) / (found.shape[2] * found.shape[3])
    return torch.bmm(shares, found.flatten(2).transpose(1, 2))


def box_above(maps: torch.Tensor, threshold: torch.Tensor, padding: float, size: tuple[int, int]) -> torch.Tensor:
    """Return the smallest box with all pixels at or above a threshold, padded, inside the image (3.2).

    Args:
        maps: ``float [N, 1, h, w]``, not negative. They are enlarged bilinearly to ``size``.
        threshold: ``float [N, 1, 1, 1]``, relative to the maximum of each enlarged map.
        padding: padding on each side, relative to the side of the image.
        size: height and width of the image in pixels.

    Returns:
        ``float [N, 4]``: x0, y0, x1, y1 relative to width and height. For a map of zeros: the whole image.
    """
    above = _compare(maps, threshold, size, torch.ge)
    edges = [_ends(above.any(dim=dimension).flatten(1)) for dimension in (2, 3)]
    (x0, x1), (y0, y1) = edges
    low, high = torch.stack([x0, y0], dim=1), torch.stack([x1, y1], dim=1)
    return torch.cat([(low - padding).clamp_min(0), (high + padding).clamp_max(1)], dim=1)


def keep_below(maps: torch.Tensor, threshold: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return 0 where a map is above a threshold and 1 elsewhere, ``float [N, 1, *size]`` (3.2).

    See `box_above` for the arguments. For a map of zeros, it is 1 everywhere.
    """
    return (~_compare(maps, threshold, size, torch.gt)).to(maps.dtype)


def crop(planes: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Crop boxes ``float [N, 4]`` (see `box_above`) from ``float [N, C, H, W]``, and enlarge them to H × W."""
    low, high = boxes[:, :2], boxes[:, 2:]
    # Coordinates of affine_grid are -1…1.
    rows = torch.cat([torch.diag_embed(high - low), (low + high - 1).unsqueeze(2)], dim=2)
    with full_precision(planes):  # otherwise the grid would be computed in half precision
        grid = F.affine_grid(rows, list(planes.shape), align_corners=False)
    return F.grid_sample(planes, grid, mode="bilinear", padding_mode="border", align_corners=False)


class Centres(nn.Module):
    """Centre regularisation: features of a class stay near the centre of the class (3.1).

    Args:
        classes: number of classes.
        width: D, length of the features.
        beta: update rate of the centres.
    """

    centres: torch.Tensor

    def __init__(self, classes: int, width: int, beta: float) -> None:
        super().__init__()
        self._beta = beta
        # A buffer, not a parameter: it is updated by a rule, not by the optimiser. It is stored for resuming.
        self.register_buffer("centres", torch.zeros(classes, width))

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean of ‖f − ĉ‖² over the batch, and update the centres. ĉ is the normalised centre of the class.

        Args:
            features: f, ``float32 [N, D]``.
            labels: ``int64 [N]``.
        """
        apart = features - F.normalize(self.centres[labels], dim=1)
        self._update(apart.detach(), labels)
        return apart.square().sum(dim=1).mean()

    @torch.no_grad()
    def _update(self, apart: torch.Tensor, labels: torch.Tensor) -> None:
        """Update the centres: c += β·mean(f − ĉ) over the images of the class.

        ``centres[labels] += …`` would keep only one of the images of a class. The mean instead of the sum makes the
        update rate independent of the number of images of a class in the batch.
        """
        counts = torch.bincount(labels, minlength=len(self.centres)).clamp_min(1)
        self.centres.index_add_(0, labels, self._beta * apart / counts[labels, None])


class _Pass(NamedTuple):
    """Outputs of one pass."""

    maps: torch.Tensor
    attention: torch.Tensor
    """``float [N, M, h, w]``, not negative."""
    embedding: torch.Tensor
    """``float32 [N, M·C]``, normalised to length `_SCALE`."""
    logits: torch.Tensor


class WSDAN(Network):
    """Bilinear attention pooling over M attention maps, with attention-guided crops and drops in training.

    The prediction is the mean over two passes: the image, and the crop of its mean attention map. It is the softmax of
    ``forward``. To get a network of one pass, distil it.

    Args:
        backbone: a convolutional classifier. Its head is not used.
        mean: see `Network`.
        std: see `Network`.
        options: a `WSDANOptions`. None: the paper's.

    Raises:
        WeightsError: the backbone has no feature maps.
    """

    summary: ClassVar[str] = "attention maps pool the features, and guide crops and drops of the training images"
    paper: ClassVar[str] = "Hu et al. 2019"
    Options: ClassVar[type[msgspec.Struct]] = WSDANOptions
    single_pass: ClassVar[bool] = False
    # The classifier's inputs have length 100: with the learning rate of a plain head, the loss rises.
    new_module_lr_ratio: ClassVar[float] = 0.02

    def __init__(self, backbone: nn.Module, mean: Triple, std: Triple, options: msgspec.Struct | None = None) -> None:
        classes, channels = backbones.classes_of(backbone), backbones.channels(backbone)
        super().__init__(backbones.without_head(backbone), mean, std, options)
        self._settings = cast(WSDANOptions, self.options)
        count = self._settings.maps
        self.attend = nn.Sequential(nn.Conv2d(channels, count, 1, bias=False), nn.BatchNorm2d(count), nn.ReLU())
        self.head = nn.Linear(count * channels, classes)
        # Without the regularisation, centres are not needed.
        weighed = self._settings.centre_weight > 0
        self.centres = Centres(classes, count * channels, self._settings.beta) if weighed else None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits, ``float32 [N, classes]``, whose softmax is the mean over the passes."""
        return self.logits_and_maps(images)[0]

    def logits_and_maps(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits of ``forward``, and the last feature maps of the first pass."""
        planes = self.normalised(images)
        whole = self._run(planes)
        if self._settings.passes == 1:
            return whole.logits, whole.maps
        closer = self._run(crop(planes, self._crop_box(whole.attention, planes)))
        return mean_logits([whole.logits, closer.logits]), whole.maps

    def loss(self, batch: Batch, criterion: Criterion) -> Step:
        """Return the mean classification loss of images, crops and drops, with centre regularisation.

        Mixed images have no centre regularisation, since they have no single class.
        """
        planes = self.normalised(batch.images)
        whole = self._run(planes)
        views = self._augmented(planes, whole.attention.detach())
        every = [whole.logits, *(self._run(view).logits for view in views)]
        loss = torch.stack([criterion(logits, batch) for logits in every]).mean()
        if self.centres is not None and batch.targets is None:
            loss = loss + self._settings.centre_weight * self.centres(whole.embedding / _SCALE, batch.labels)
        return Step(loss, whole.logits, whole.embedding)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Return the embedding of whole images, ``float32 [N, M·C]``, normalised to length 100."""
        return self._run(self.normalised(images)).embedding

    @torch.no_grad()
    def attention(self, images: torch.Tensor) -> Attention:
        """Return 1 + M maps, the mean attention map first, and the box of the second pass."""
        planes = self.normalised(images)
        found = self._run(planes).attention
        maps = torch.cat([found.mean(dim=1, keepdim=True), found], dim=1)
        box = self._crop_box(found, planes).unsqueeze(1).float()
        return Attention(scaled(maps), box, ("crop",), strength=maps.mean(dim=(2, 3)).float())

    def new_modules(self) -> Sequence[nn.Module]:
        """List the attention convolution and the classifier."""
        return [self.attend, self.head]

    def _run(self, planes: torch.Tensor) -> _Pass:
        found = backbones.maps(self.backbone, planes)
        attention = self.attend(found)
        pooled = attention_pooling(attention, found).flatten(1).float()
        embedded = F.normalize(signed_root(pooled), dim=1) * _SCALE
        return _Pass(found, attention, embedded, self.head(embedded))

    def _crop_box(self, attention: torch.Tensor, planes: torch.Tensor) -> torch.Tensor:
        """Return the box of the second pass of a prediction."""
        mean = attention.mean(dim=1, keepdim=True)
        threshold = mean.new_full((len(mean), 1, 1, 1), self._settings.test_threshold)
        return box_above(mean, threshold, self._settings.test_padding, _size(planes))

    def _augmented(self, planes: torch.Tensor, attention: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Crop and drop the region of one attention map of each image, drawn with a probability by its strength."""
        s = self._settings
        strength = attention.float().mean(dim=(2, 3)).sqrt()
        # Zero or non-finite strengths must not make the draw fail, which would end the process on a GPU. The loss then
        # reports that numbers are not finite.
        drawn = torch.multinomial(strength.nan_to_num(0, 0) + 1e-12, 1)
        chosen = attention.gather(1, drawn[:, :, None, None].expand(-1, -1, *attention.shape[2:]))
        shape = (len(chosen), 1, 1, 1)
        crops = chosen.new_empty(shape).uniform_(s.crop_low, s.crop_high)
        drops = chosen.new_empty(shape).uniform_(s.drop_low, s.drop_high)
        size = _size(planes)
        # 0 is the mean colour, since planes are normalised.
        dropped = planes * keep_below(chosen, drops, size)
        return crop(planes, box_above(chosen, crops, s.crop_padding, size)), dropped


def _size(planes: torch.Tensor) -> tuple[int, int]:
    return planes.shape[2], planes.shape[3]


def _compare(
    maps: torch.Tensor,
    threshold: torch.Tensor,
    size: tuple[int, int],
    comparison: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Compare maps, enlarged to ``size``, with thresholds relative to their maxima. Returns ``bool [N, 1, *size]``."""
    enlarged = F.interpolate(maps, size, mode="bilinear", align_corners=False)
    # The maximum of the enlarged map can be lower than that of the map, and must reach the threshold.
    return comparison(enlarged, threshold * enlarged.amax(dim=(2, 3), keepdim=True))


def _ends(line: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the start of the first true of ``bool [N, S]`` and the end of the last, ``float32 [N]``, relative to S."""
    length, flags = line.shape[1], line.int()
    return flags.argmax(dim=1) / length, 1 - flags.flip(1).argmax(dim=1) / length
