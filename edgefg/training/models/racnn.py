"""RA-CNN: a recurrent attention network that crops and zooms twice on the most discriminative region.

Fu, Zheng & Mei 2017, "Look Closer to See Better". Boxes are ``float [N, 3]``: the paper's tx, ty, tl, which are
centre and *half* side relative to width and height. A box of half the side has tl = 0.25.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from enum import Enum
from typing import Annotated, ClassVar, Literal, NamedTuple, cast

import msgspec
import torch
from msgspec import Meta
from torch import nn
from torch.nn import functional as F

from edgefg.training.models import backbone as backbones
from edgefg.training.models.backbone import Triple
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

_SCALES = 3
# A box of half the side: the initial output of the proposal networks, and the box around the peak of the maps.
_FIRST_TL = 0.25
# Positions along a side in the search for the peak.
_PLACES = 17


class Phase(Enum):
    """Phase of an epoch: the trained modules and their loss."""

    CLASSIFY = "backbones, classifiers and fusion, on the cross entropies"
    PEAK = "the proposal networks, on the most responsive region"
    RANK = "the proposal networks, on the rank loss"


class RACNNOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of RA-CNN. The paper does not state the size of the proposal networks and the length of the phases."""

    size2: Annotated[float, Meta(description="Input side of scale 2, relative to the network input.", ge=0.1, le=1)] = (
        0.5
    )
    size3: Annotated[float, Meta(description="Input side of scale 3, relative to the network input.", ge=0.1, le=1)] = (
        0.5
    )
    shared: Annotated[bool, Meta(description="Use one backbone for all scales instead of one each.")] = False
    steepness: Annotated[float, Meta(description="k of the mask h(x) = 1/(1+e^(-kx)), x in pixels.", gt=0)] = 10.0
    margin: Annotated[float, Meta(description="Margin of the rank loss (a probability).", ge=0, le=1)] = 0.05
    floor: Annotated[float, Meta(description="Smallest side of a crop, relative to its image.", ge=0.1, le=0.45)] = (
        1 / 3
    )
    hidden: Annotated[int, Meta(description="Width of the first layer of the proposal networks.", ge=1)] = 128
    grid: Annotated[int, Meta(description="The proposal networks average the maps to grid × grid.", ge=1)] = 4
    fusion: Annotated[
        Literal["mean", "learned"],
        Meta(
            description="Prediction: mean of the scales' probabilities, or the paper's linear layer on all descriptors."
        ),
    ] = "mean"
    warm_share: Annotated[
        float, Meta(description="Share of the epochs before the proposal networks are trained.", ge=0, le=1)
    ] = 0.4
    peak_share: Annotated[
        float, Meta(description="Share of the epochs that train them on the peak of the maps.", ge=0, le=1)
    ] = 0.2
    rank_share: Annotated[float, Meta(description="Share of the other epochs that use the rank loss.", ge=0, lt=1)] = (
        0.25
    )


def boxcar(box: torch.Tensor, height: int, width: int, k: float) -> torch.Tensor:
    """Return the masks of boxes, ``float [N, 1, height, width]`` in 0…1 (equation 5; pixel centres at half pixels).

    M(x, y) = [h(x − tx + tl) − h(x − tx − tl)] · [h(y − ty + tl) − h(y − ty − tl)] with h(x) = 1 / (1 + e^(−kx)).
    """
    tx, ty, tl = box.unsqueeze(-1).unbind(dim=1)

    def along(centre: torch.Tensor, side: int) -> torch.Tensor:
        at = torch.arange(side, device=box.device, dtype=box.dtype) + 0.5
        return torch.sigmoid(k * (at - (centre - tl) * side)) - torch.sigmoid(k * (at - (centre + tl) * side))

    return (along(ty, height).unsqueeze(2) * along(tx, width).unsqueeze(1)).unsqueeze(1)


def zoom(planes: torch.Tensor, box: torch.Tensor, size: tuple[int, int], k: float) -> torch.Tensor:
    """Mask planes ``float [N, C, H, W]`` and enlarge the box bilinearly to ``size`` (equations 4, 7 and 8).

    The box has a gradient through the mask, and through the sampling positions.
    """
    masked = planes * boxcar(box, planes.shape[2], planes.shape[3], k)
    tx, ty, tl = box.unbind(dim=1)
    zero = torch.zeros_like(tl)
    # Coordinates of affine_grid are -1…1, so that the relative half side is the scale.
    rows = [torch.stack([2 * tl, zero, 2 * tx - 1], dim=1), torch.stack([zero, 2 * tl, 2 * ty - 1], dim=1)]
    with full_precision(planes):  # otherwise the grid would be computed in half precision
        grid = F.affine_grid(torch.stack(rows, dim=1), [len(planes), planes.shape[1], *size], align_corners=False)
    return F.grid_sample(masked, grid, mode="bilinear", padding_mode="border", align_corners=False)


def within(outer: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    """Return a box ``inner`` of the crop ``outer`` relative to the image that was cropped."""
    corner = outer[:, :2] - outer[:, 2:]
    return torch.cat([corner + inner[:, :2] * 2 * outer[:, 2:], 2 * outer[:, 2:] * inner[:, 2:]], dim=1)


def peak_box(found: torch.Tensor) -> torch.Tensor:
    """Return the box of half the side, inside the image, where maps ``float [N, C, h, w]`` respond most."""
    cells = 2 * (_PLACES - 1)
    mean = found.float().mean(dim=1, keepdim=True)
    response = F.interpolate(mean, (cells, cells), mode="bilinear", align_corners=False)
    place = F.avg_pool2d(response, _PLACES - 1, stride=1).flatten(1).argmax(dim=1)
    xy = torch.stack([place % _PLACES, torch.div(place, _PLACES, rounding_mode="floor")], dim=1)
    centre = _FIRST_TL + xy.to(mean.dtype) / cells
    return torch.cat([centre, torch.full_like(centre[:, :1], _FIRST_TL)], dim=1)


def rank_loss(probabilities: Sequence[torch.Tensor], margin: float) -> torch.Tensor:
    """Return Σₛ max(0, pₛ − pₛ₊₁ + margin), mean over the batch (equation 9).

    Args:
        probabilities: probabilities of the true class for each scale, ``float [N]``. The coarser one of a pair is the
            reference (the paper's term): it has no gradient.
        margin: by how much the probability of a finer scale must be higher.
    """
    pairs = itertools.pairwise(probabilities)
    return torch.stack([F.relu(coarse.detach() - fine + margin).mean() for coarse, fine in pairs]).sum()


def true_probability(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return the probability of the true class, ``float32 [N]``. For mixed images: the mean over their targets."""
    probabilities = logits.float().softmax(dim=1)
    if batch.targets is not None:
        return (probabilities * batch.targets).sum(dim=1)
    return probabilities.gather(1, batch.labels[:, None])[:, 0]


class ProposalNetwork(nn.Module):
    """Attention proposal network: one box from the last maps (equation 3), two layers with tanh and sigmoid.

    The sigmoids select from what is allowed: a side between ``floor`` and 1, and a centre that keeps the box inside.
    Boxes are therefore never clamped, which would stop the gradient. The initial box is the centre with half the side.

    Args:
        channels: channels of the maps.
        options: ``hidden``, ``grid`` and ``floor`` are used.
    """

    def __init__(self, channels: int, options: RACNNOptions) -> None:
        super().__init__()
        self._floor = options.floor
        # The image size is not known here: maps of any size are averaged to one grid.
        self.pool = nn.AdaptiveAvgPool2d(options.grid)
        self.first = nn.Linear(channels * options.grid**2, options.hidden)
        self.second = nn.Linear(options.hidden, 3)
        nn.init.zeros_(self.second.weight)
        side = (2 * _FIRST_TL - options.floor) / (1 - options.floor)
        self.second.bias.data = torch.tensor([0.0, 0.0, math.log(side / (1 - side))])

    def forward(self, found: torch.Tensor) -> torch.Tensor:
        """Return the boxes, ``float [N, 3]``, of maps ``float [N, C, h, w]``."""
        hidden = torch.tanh(self.first(self.pool(found).flatten(1)))
        # Always in float32: boxes are converted to pixels, and beyond 256 bfloat16 has even pixels only.
        shares = torch.sigmoid(self.second(hidden).float())
        tl = (self._floor + (1 - self._floor) * shares[:, 2:]) / 2
        return torch.cat([tl + (1 - 2 * tl) * shares[:, :2], tl], dim=1)


class _Scale(NamedTuple):
    """Outputs of one scale."""

    maps: torch.Tensor
    embedding: torch.Tensor
    logits: torch.Tensor
    box: torch.Tensor | None
    """Input of the next scale; None for the last one."""


class RACNN(Network):
    """Three scales, each a crop of the one before. Their probabilities are averaged.

    With the paper's fusion (``fusion=learned``), a linear layer reads the normalised descriptors of all scales. It is
    trained with the classifiers, and has no gradient into the backbones. With few images it is less accurate
    (``docs/experiments/attention.md``).

    Training alternates between epochs, see `phase_of`. A run of at least eleven epochs contains all phases.

    Args:
        backbone: a convolutional classifier. Finer scales start as copies of it.
        mean: see `Network`.
        std: see `Network`.
        options: an `RACNNOptions`. None: defaults.
    """

    summary: ClassVar[str] = "crops and zooms twice on the most discriminative region, learned from the labels only"
    paper: ClassVar[str] = "Fu et al. 2017"
    Options: ClassVar[type[msgspec.Struct]] = RACNNOptions
    single_pass: ClassVar[bool] = False

    def __init__(self, backbone: nn.Module, mean: Triple, std: Triple, options: msgspec.Struct | None = None) -> None:
        super().__init__(backbone, mean, std, options)
        self._settings = cast(RACNNOptions, self.options)
        finer = 0 if self._settings.shared else _SCALES - 1
        self.finer = nn.ModuleList([copy.deepcopy(backbone) for _ in range(finer)])
        self.proposals = nn.ModuleList(
            [ProposalNetwork(backbones.channels(backbone), self._settings) for _ in range(_SCALES - 1)]
        )
        width = cast(torch.Tensor, backbones.head_of(backbone).weight).shape[1]
        learned = self._settings.fusion == "learned"
        self.fusion = nn.Linear(_SCALES * width, backbones.classes_of(backbone)) if learned else None
        self.phase = Phase.CLASSIFY

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the fused logits of the three scales, ``float32 [N, classes]``."""
        return self._fuse(self._run_scales(images, _SCALES))

    def logits_and_maps(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the fused logits, and the last feature maps of the first scale."""
        scales = self._run_scales(images, _SCALES)
        return self._fuse(scales), scales[0].maps

    def loss(self, batch: Batch, criterion: Criterion) -> Step:
        """Return the loss of the present phase: cross entropies, distance from the peak, or rank loss."""
        # The peak phase does not use the third scale.
        scales = self._run_scales(batch.images, _SCALES - 1 if self.phase is Phase.PEAK else _SCALES)
        whole = scales[0]
        if self.phase is Phase.CLASSIFY:
            every = [one.logits for one in scales] + ([self._fuse(scales)] if self.fusion is not None else [])
            loss = torch.stack([criterion(logits, batch) for logits in every]).sum()
        elif self.phase is Phase.PEAK:
            distances = [F.smooth_l1_loss(cast(torch.Tensor, one.box), peak_box(one.maps), beta=0.1) for one in scales]
            loss = torch.stack(distances).sum()
        else:
            loss = rank_loss([true_probability(one.logits, batch) for one in scales], self._settings.margin)
        return Step(loss, whole.logits, whole.embedding)

    @torch.no_grad()
    def attention(self, images: torch.Tensor) -> Attention:
        """Return the boxes of scales 2 and 3, and the mean of the last feature maps of the whole image."""
        first, second, *_ = self._run_scales(images, _SCALES - 1)
        outer, inner = cast(torch.Tensor, first.box), cast(torch.Tensor, second.box)
        boxes = torch.stack([outer, within(outer, inner)], dim=1).float()
        centre, half = boxes[..., :2], boxes[..., 2:]
        corners = torch.cat([centre - half, centre + half], dim=2)
        return Attention(scaled(first.maps.mean(dim=1, keepdim=True)), corners, ("scale 2", "scale 3"))

    def new_modules(self) -> Sequence[nn.Module]:
        """List the classifiers and the learned fusion, if there is one.

        The proposal networks are untrained too, but learn better at the learning rate of the backbones.
        """
        heads = map(backbones.head_of, [self.backbone, *self.finer])
        return [*heads, *([] if self.fusion is None else [self.fusion])]

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Choose the phase of an epoch, and freeze what is not trained in it. Frozen norms keep their statistics.

        Call it after ``train()`` and after unfreezing, as the training loop does: it unfreezes only the proposal
        networks.
        """
        self.phase = phase_of(epoch, epochs, self._settings)
        self.proposals.requires_grad_(self.phase is not Phase.CLASSIFY)
        if self.phase is Phase.CLASSIFY:
            return
        for child in self.children():
            if child is not self.proposals:
                child.requires_grad_(False).eval()

    def classifies_in(self, epoch: int, epochs: int) -> bool:
        """Whether classifiers are trained, and the proposal networks were before. Early stopping counts no others."""
        first = next((e for e in range(epochs) if phase_of(e, epochs, self._settings) is not Phase.CLASSIFY), 0)
        return epoch >= first and phase_of(epoch, epochs, self._settings) is Phase.CLASSIFY

    def _run_scales(self, images: torch.Tensor, count: int) -> list[_Scale]:
        """Run the scales, each on a crop of the one before.

        The gradient of a proposal network comes from the next scale only, and ends at its input maps and crop. The
        backbones therefore learn only from their classifiers.
        """
        planes = self.normalised(images)
        height, width = planes.shape[2:]
        shares = (1.0, self._settings.size2, self._settings.size3)
        networks = [self.backbone, *self.finer] if self.finer else [self.backbone] * _SCALES
        scales: list[_Scale] = []
        for scale in range(count):
            found = backbones.maps(networks[scale], planes)
            embedded = backbones.embedding(networks[scale], found)
            logits = backbones.classify(networks[scale], embedded)
            box = self.proposals[scale](found.detach()) if scale < _SCALES - 1 else None
            scales.append(_Scale(found, embedded, logits, box))
            if box is not None and scale + 1 < count:
                size = (round(height * shares[scale + 1]), round(width * shares[scale + 1]))
                followed = box if self.phase is Phase.RANK else box.detach()
                planes = zoom(planes.detach(), followed, size, self._settings.steepness)
        return scales

    def _fuse(self, scales: Sequence[_Scale]) -> torch.Tensor:
        if self.fusion is None:
            return mean_logits([one.logits for one in scales])
        # Elements of about 1, so that the layer learns at an ordinary rate.
        embedded = [one.embedding.detach() for one in scales]
        descriptors = [F.normalize(e, dim=1) * math.sqrt(e.shape[1]) for e in embedded]
        return cast(torch.Tensor, self.fusion(torch.cat(descriptors, dim=1)))


def phase_of(epoch: int, epochs: int, options: RACNNOptions) -> Phase:
    """Return what is trained in epoch ``epoch`` (counted from 0) of ``epochs``.

    First the classifiers are trained on centre crops (``warm_share``), then the proposal networks on the peak of the
    maps (``peak_share``). Then both alternate, as in the paper. The first and the last of these epochs always train
    classifiers: the rank loss needs trained ones, and the prediction needs classifiers that have seen the final crops.
    With a ``warm_share`` of 0.4, validation accuracy on synthetic birds was 3 points higher than with 0 (three seeds,
    ``docs/experiments/attention.md``).
    """
    warm = round(options.warm_share * epochs)
    peak = max(1, round(options.peak_share * epochs)) if options.peak_share else 0
    left = epochs - 1 - epoch
    if epoch < warm or epoch == warm + peak or left == 0:
        return Phase.CLASSIFY
    if epoch < warm + peak:
        return Phase.PEAK
    turn = math.floor((left + 1) * options.rank_share) > math.floor(left * options.rank_share)
    return Phase.RANK if turn else Phase.CLASSIFY
