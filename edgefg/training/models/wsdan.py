"""WS-DAN: attention maps, learned from the classes alone, pool the features and cut and blank out parts of the image.

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

from edgefg.training.models import backbone as parts
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

# Lengthens the pooled vector of length 1, so that logits can be far apart under an ordinary learning rate.
_SCALE = 100.0


class WSDANOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of WS-DAN; a threshold is a share of a map's greatest value, a padding one of the image's side."""

    maps: Annotated[int, Meta(description="attention maps, M", ge=1)] = 32
    crop_low: Annotated[float, Meta(description="least threshold of the training crop", ge=0, lt=1)] = 0.4
    crop_high: Annotated[float, Meta(description="greatest threshold of the training crop", ge=0, lt=1)] = 0.6
    crop_padding: Annotated[float, Meta(description="added to each side of the training crop", ge=0, lt=1)] = 0.1
    drop_low: Annotated[float, Meta(description="least threshold of what is blanked out", ge=0, lt=1)] = 0.2
    drop_high: Annotated[float, Meta(description="greatest threshold of what is blanked out", ge=0, lt=1)] = 0.5
    beta: Annotated[float, Meta(description="rate at which the centres of the classes move", gt=0, le=1)] = 0.05
    centre_weight: Annotated[float, Meta(description="weight of the centre regularisation; 0: none", ge=0)] = 1.0
    passes: Annotated[int, Meta(description="1: predict from the image; 2: and from its crop", ge=1, le=2)] = 2
    test_threshold: Annotated[float, Meta(description="threshold of the prediction's crop", ge=0, lt=1)] = 0.1
    test_padding: Annotated[float, Meta(description="added to each side of the prediction's crop", ge=0, lt=1)] = 0.05

    def __post_init__(self) -> None:
        for name, low, high in (("crop", self.crop_low, self.crop_high), ("drop", self.drop_low, self.drop_high)):
            if low > high:
                raise ValueError(f"{name}_low is {low} and {name}_high {high}; needed {name}_low <= {name}_high")


def attention_pooling(attention: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Return AᵀX / HW, ``float [N, M, C]``: per attention map, the mean of the features weighted by it (section 3.1).

    Args:
        attention: A, ``float [N, M, h, w]``.
        found: X, ``float [N, C, h, w]``.
    """
    # Divided first: a sum over all positions could leave the range of half precision.
    shares = attention.flatten(2) / (found.shape[2] * found.shape[3])
    return torch.bmm(shares, found.flatten(2).transpose(1, 2))


def box_above(maps: torch.Tensor, threshold: torch.Tensor, padding: float, size: tuple[int, int]) -> torch.Tensor:
    """Return the smallest box of all pixels at or above a threshold, padded, inside the image (3.2).

    Args:
        maps: ``float [N, 1, h, w]``, not negative; enlarged bilinearly to ``size``.
        threshold: ``float [N, 1, 1, 1]``, shares of each enlarged map's maximum.
        padding: added on each side, as a share of the image's side.
        size: height and width of the image, pixels.

    Returns:
        ``float [N, 4]``: x0, y0, x1, y1 as shares of width and height. A map of zeros has the whole image.
    """
    above = _compare(maps, threshold, size, torch.ge)
    edges = [_ends(above.any(dim=dimension).flatten(1)) for dimension in (2, 3)]
    (x0, x1), (y0, y1) = edges
    low, high = torch.stack([x0, y0], dim=1), torch.stack([x1, y1], dim=1)
    return torch.cat([(low - padding).clamp_min(0), (high + padding).clamp_max(1)], dim=1)


def keep_below(maps: torch.Tensor, threshold: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return 0 where a map is above a threshold and 1 elsewhere, ``float [N, 1, *size]`` (3.2).

    See `box_above` for the arguments. A map of zeros keeps the whole image.
    """
    return (~_compare(maps, threshold, size, torch.gt)).to(maps.dtype)


def crop(planes: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Cut boxes ``float [N, 4]``, as of `box_above`, out of ``float [N, C, H, W]`` and enlarge them to H × W."""
    low, high = boxes[:, :2], boxes[:, 2:]
    # affine_grid counts from -1 to 1.
    rows = torch.cat([torch.diag_embed(high - low), (low + high - 1).unsqueeze(2)], dim=2)
    with full_precision(planes):  # without it the grid would be a product in half precision
        grid = F.affine_grid(rows, list(planes.shape), align_corners=False)
    return F.grid_sample(planes, grid, mode="bilinear", padding_mode="border", align_corners=False)


class Centres(nn.Module):
    """Centre regularisation: features of a class stay near one centre per class (3.1).

    Args:
        classes: number of centres.
        width: D, their length.
        beta: rate at which a centre follows its class.
    """

    centres: torch.Tensor

    def __init__(self, classes: int, width: int, beta: float) -> None:
        super().__init__()
        self._beta = beta
        # A buffer, not a parameter: the rule moves it and no optimiser does; stored, so that a run resumes.
        self.register_buffer("centres", torch.zeros(classes, width))

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean over the batch of ‖f − ĉ‖², ĉ being the centre of f's class at length 1; move the centres.

        Args:
            features: f, ``float32 [N, D]``.
            labels: ``int64 [N]``.
        """
        apart = features - F.normalize(self.centres[labels], dim=1)
        self._follow(apart.detach(), labels)
        return apart.square().sum(dim=1).mean()

    @torch.no_grad()
    def _follow(self, apart: torch.Tensor, labels: torch.Tensor) -> None:
        """Move the centres: c += β·mean(f − ĉ) over the images of the class.

        ``centres[labels] += …`` would keep only one of the images of a class. Their mean, not their sum, is taken, so
        that β is the rate at which a centre forgets however many images of its class a batch happens to have.
        """
        counts = torch.bincount(labels, minlength=len(self.centres)).clamp_min(1)
        self.centres.index_add_(0, labels, self._beta * apart / counts[labels, None])


class _Look(NamedTuple):
    """What one pass sees."""

    maps: torch.Tensor
    attention: torch.Tensor
    """``float [N, M, h, w]``, not negative."""
    embedding: torch.Tensor
    """``float32 [N, M·C]`` of length `_SCALE`."""
    logits: torch.Tensor


class WSDAN(Network):
    """Bilinear attention pooling over M attention maps, trained also on what they cut and blank out.

    The prediction is the mean of two passes, of the image and of the part that the mean attention map cuts out; softmax
    of ``forward`` gives it. A network of one pass learns it best by distillation.

    Args:
        backbone: a convolutional classifier; its head is dropped.
        mean: see `Network`.
        std: see `Network`.
        options: a `WSDANOptions`; None takes the paper's.

    Raises:
        WeightsError: the backbone has no feature maps.
    """

    summary: ClassVar[str] = "attention maps pool the features, and cut and blank out parts of the training images"
    paper: ClassVar[str] = "Hu et al. 2019"
    Options: ClassVar[type[msgspec.Struct]] = WSDANOptions
    single_pass: ClassVar[bool] = False
    # The classifier reads vectors of length 100: at a plain head's rate its loss rises from the first step.
    new_module_lr_ratio: ClassVar[float] = 0.02

    def __init__(self, backbone: nn.Module, mean: Triple, std: Triple, options: msgspec.Struct | None = None) -> None:
        classes, channels = parts.classes_of(backbone), parts.channels(backbone)
        super().__init__(parts.without_head(backbone), mean, std, options)
        self._settings = cast(WSDANOptions, self.options)
        count = self._settings.maps
        self.attend = nn.Sequential(nn.Conv2d(channels, count, 1, bias=False), nn.BatchNorm2d(count), nn.ReLU())
        self.head = nn.Linear(count * channels, classes)
        # Without its term there is nothing that needs them.
        weighed = self._settings.centre_weight > 0
        self.centres = Centres(classes, count * channels, self._settings.beta) if weighed else None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits, ``float32 [N, classes]``, whose softmax is the mean over the passes."""
        return self.logits_and_maps(images)[0]

    def logits_and_maps(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits as ``forward`` does, and the last maps of the first pass."""
        planes = self.normalised(images)
        whole = self._look(planes)
        if self._settings.passes == 1:
            return whole.logits, whole.maps
        closer = self._look(crop(planes, self._attended(whole.attention, planes)))
        return mean_logits([whole.logits, closer.logits]), whole.maps

    def loss(self, batch: Batch, criterion: Criterion) -> Step:
        """Return the mean classification loss of the images, their crops and their drops, with the centres' term.

        The term is left out where images were mixed, since they belong to no one class.
        """
        planes = self.normalised(batch.images)
        whole = self._look(planes)
        views = self._augmented(planes, whole.attention.detach())
        every = [whole.logits, *(self._look(view).logits for view in views)]
        loss = torch.stack([criterion(logits, batch) for logits in every]).mean()
        if self.centres is not None and batch.targets is None:
            loss = loss + self._settings.centre_weight * self.centres(whole.embedding / _SCALE, batch.labels)
        return Step(loss, whole.logits, whole.embedding)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Return the embedding, ``float32 [N, M·C]`` of length 100, of whole images."""
        return self._look(self.normalised(images)).embedding

    @torch.no_grad()
    def attention(self, images: torch.Tensor) -> Attention:
        """Return 1 + M maps, the mean attention map first, and the box that the second pass looks at."""
        planes = self.normalised(images)
        found = self._look(planes).attention
        maps = torch.cat([found.mean(dim=1, keepdim=True), found], dim=1)
        box = self._attended(found, planes).unsqueeze(1).float()
        return Attention(scaled(maps), box, ("crop",), strength=maps.mean(dim=(2, 3)).float())

    def new_modules(self) -> Sequence[nn.Module]:
        """List the attention convolution and the classifier."""
        return [self.attend, self.head]

    def _look(self, planes: torch.Tensor) -> _Look:
        found = parts.maps(self.backbone, planes)
        attention = self.attend(found)
        pooled = attention_pooling(attention, found).flatten(1).float()
        embedded = F.normalize(signed_root(pooled), dim=1) * _SCALE
        return _Look(found, attention, embedded, self.head(embedded))

    def _attended(self, attention: torch.Tensor, planes: torch.Tensor) -> torch.Tensor:
        """Return the box that the prediction's second pass looks at."""
        mean = attention.mean(dim=1, keepdim=True)
        threshold = mean.new_full((len(mean), 1, 1, 1), self._settings.test_threshold)
        return box_above(mean, threshold, self._settings.test_padding, _size(planes))

    def _augmented(self, planes: torch.Tensor, attention: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cut and blank out what one attention map of each image, drawn by its strength, responds to."""
        s = self._settings
        strength = attention.float().mean(dim=(2, 3)).sqrt()
        # A picture that no map responds to must draw one as well; so must one whose maps are no longer finite, of which
        # the loss tells: a draw that fails on a GPU would end the process.
        drawn = torch.multinomial(strength.nan_to_num(0, 0) + 1e-12, 1)
        chosen = attention.gather(1, drawn[:, :, None, None].expand(-1, -1, *attention.shape[2:]))
        shape = (len(chosen), 1, 1, 1)
        crops = chosen.new_empty(shape).uniform_(s.crop_low, s.crop_high)
        drops = chosen.new_empty(shape).uniform_(s.drop_low, s.drop_high)
        size = _size(planes)
        # 0 is the mean colour: planes are normalised.
        blanked = planes * keep_below(chosen, drops, size)
        return crop(planes, box_above(chosen, crops, s.crop_padding, size)), blanked


def _size(planes: torch.Tensor) -> tuple[int, int]:
    return planes.shape[2], planes.shape[3]


def _compare(
    maps: torch.Tensor,
    threshold: torch.Tensor,
    size: tuple[int, int],
    comparison: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Compare maps enlarged to ``size`` with shares of their own maxima; ``bool [N, 1, *size]``."""
    enlarged = F.interpolate(maps, size, mode="bilinear", align_corners=False)
    # Of the enlarged map: its peak can be lower, and something must always reach the threshold.
    return comparison(enlarged, threshold * enlarged.amax(dim=(2, 3), keepdim=True))


def _ends(line: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where the first true of ``bool [N, S]`` begins and the last one ends, ``float32 [N]``, as shares of S."""
    length, flags = line.shape[1], line.int()
    return flags.argmax(dim=1) / length, 1 - flags.flip(1).argmax(dim=1) / length
