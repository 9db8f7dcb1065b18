"""RA-CNN: a recurrent attention network that crops and zooms, twice, on what tells the classes apart.

Fu, Zheng & Mei 2017, "Look Closer to See Better". Throughout, a box is ``float [N, 3]``: tx, ty, tl, the paper's centre
and *half* side, as shares of width and height, so that tl = 0.25 is a box of half the side.
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

from edgefg.training.models import backbone as parts
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
# A box of half the side: what an untrained proposal network cuts out, and what the peak of the maps proposes.
_FIRST_TL = 0.25
# Places along a side among which the most responsive one is searched.
_PLACES = 17


class Phase(Enum):
    """What learns in an epoch."""

    CLASSIFY = "backbones, classifiers and fusion, on the cross entropies"
    PEAK = "the proposal networks, on the most responsive region"
    RANK = "the proposal networks, on the rank loss"


class RACNNOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of RA-CNN; the paper leaves open the proposal networks' sizes and the lengths of the phases."""

    size2: Annotated[float, Meta(description="input side of scale 2 as a share of the network's", ge=0.1, le=1)] = 0.5
    size3: Annotated[float, Meta(description="input side of scale 3 as a share of the network's", ge=0.1, le=1)] = 0.5
    shared: Annotated[bool, Meta(description="one backbone for all scales instead of one each")] = False
    steepness: Annotated[float, Meta(description="k of the mask's h(x) = 1/(1+e^(-kx)), x in pixels", gt=0)] = 10.0
    margin: Annotated[float, Meta(description="of the rank loss, in probability", ge=0, le=1)] = 0.05
    floor: Annotated[float, Meta(description="least side of a crop as a share of its image's", ge=0.1, le=0.45)] = 1 / 3
    hidden: Annotated[int, Meta(description="width of the proposal networks' first layer", ge=1)] = 128
    grid: Annotated[int, Meta(description="proposal networks see the maps averaged to grid × grid", ge=1)] = 4
    fusion: Annotated[
        Literal["mean", "learned"],
        Meta(description="prediction: the mean of the scales' probabilities, or the paper's layer on all descriptors"),
    ] = "mean"
    warm_share: Annotated[float, Meta(description="share of the epochs before proposals learn", ge=0, le=1)] = 0.4
    peak_share: Annotated[float, Meta(description="share that teaches them the maps' peak", ge=0, le=1)] = 0.2
    rank_share: Annotated[float, Meta(description="share of the rest that is on the rank loss", ge=0, lt=1)] = 0.25


def boxcar(box: torch.Tensor, height: int, width: int, k: float) -> torch.Tensor:
    """Return the mask of boxes, ``float [N, 1, height, width]`` of 0…1 (equation 5; pixel centres at half pixels).

    M(x, y) = [h(x − tx + tl) − h(x − tx − tl)] · [h(y − ty + tl) − h(y − ty − tl)] with h(x) = 1 / (1 + e^(−kx)).
    """
    tx, ty, tl = box.unsqueeze(-1).unbind(dim=1)

    def along(centre: torch.Tensor, side: int) -> torch.Tensor:
        at = torch.arange(side, device=box.device, dtype=box.dtype) + 0.5
        return torch.sigmoid(k * (at - (centre - tl) * side)) - torch.sigmoid(k * (at - (centre + tl) * side))

    return (along(ty, height).unsqueeze(2) * along(tx, width).unsqueeze(1)).unsqueeze(1)


def zoom(planes: torch.Tensor, box: torch.Tensor, size: tuple[int, int], k: float) -> torch.Tensor:
    """Mask planes ``float [N, C, H, W]`` and enlarge the box bilinearly to ``size`` (equations 4, 7 and 8).

    The box gets its gradient through the mask and through the sampling positions.
    """
    masked = planes * boxcar(box, planes.shape[2], planes.shape[3], k)
    tx, ty, tl = box.unbind(dim=1)
    zero = torch.zeros_like(tl)
    # affine_grid counts from -1 to 1, so that the half side in shares is the scale.
    rows = [torch.stack([2 * tl, zero, 2 * tx - 1], dim=1), torch.stack([zero, 2 * tl, 2 * ty - 1], dim=1)]
    with full_precision(planes):  # without it the grid would be a product in half precision
        grid = F.affine_grid(torch.stack(rows, dim=1), [len(planes), planes.shape[1], *size], align_corners=False)
    return F.grid_sample(masked, grid, mode="bilinear", padding_mode="border", align_corners=False)


def within(outer: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    """Return, as shares of what ``outer`` was cut from, the box that ``inner`` is inside the crop ``outer``."""
    corner = outer[:, :2] - outer[:, 2:]
    return torch.cat([corner + inner[:, :2] * 2 * outer[:, 2:], 2 * outer[:, 2:] * inner[:, 2:]], dim=1)


def peak_box(found: torch.Tensor) -> torch.Tensor:
    """Return the box of half the side where maps ``float [N, C, h, w]`` respond most; inside the image."""
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
        probabilities: of the true class (after softmax), scale by scale, each ``float [N]``. The coarser one of a pair
            is a reference, as the paper calls it: no gradient makes it less sure.
        margin: by how much a finer scale must be surer.
    """
    pairs = itertools.pairwise(probabilities)
    return torch.stack([F.relu(coarse.detach() - fine + margin).mean() for coarse, fine in pairs]).sum()


def true_probability(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return the probability of the true class, ``float32 [N]``; of mixed images, the mean over their targets."""
    probabilities = logits.float().softmax(dim=1)
    if batch.targets is not None:
        return (probabilities * batch.targets).sum(dim=1)
    return probabilities.gather(1, batch.labels[:, None])[:, 0]


class ProposalNetwork(nn.Module):
    """Attention proposal network: the last maps → one box (equation 3), two layers with tanh and sigmoid.

    The sigmoids are shares of what is allowed: a side between ``floor`` and 1, a centre that keeps the box inside. So
    no box ever has to be clamped, which would stop its gradient. Untrained, it cuts out the centre, half the side.

    Args:
        channels: of the maps.
        options: its ``hidden``, ``grid`` and ``floor`` are used.
    """

    def __init__(self, channels: int, options: RACNNOptions) -> None:
        super().__init__()
        self._floor = options.floor
        # An image size is not known here: any maps are averaged to one grid.
        self.pool = nn.AdaptiveAvgPool2d(options.grid)
        self.first = nn.Linear(channels * options.grid**2, options.hidden)
        self.second = nn.Linear(options.hidden, 3)
        nn.init.zeros_(self.second.weight)
        side = (2 * _FIRST_TL - options.floor) / (1 - options.floor)
        self.second.bias.data = torch.tensor([0.0, 0.0, math.log(side / (1 - side))])

    def forward(self, found: torch.Tensor) -> torch.Tensor:
        """Return the boxes, ``float [N, 3]``, of maps ``float [N, C, h, w]``."""
        hidden = torch.tanh(self.first(self.pool(found).flatten(1)))
        # In float32 also under mixed precision: pixels are counted from the box, which bfloat16 cannot beyond 256.
        shares = torch.sigmoid(self.second(hidden).float())
        tl = (self._floor + (1 - self._floor) * shares[:, 2:]) / 2
        return torch.cat([tl + (1 - 2 * tl) * shares[:, :2], tl], dim=1)


class _Look(NamedTuple):
    """What one scale sees."""

    maps: torch.Tensor
    embedding: torch.Tensor
    logits: torch.Tensor
    box: torch.Tensor | None
    """What the next scale sees of it; None at the last."""


class RACNN(Network):
    """Three scales, each the attended part of the one before, zoomed; their probabilities are averaged.

    The paper's own fusion (``fusion=learned``) normalises each scale's descriptor and lets one fully connected layer
    read all three; that layer learns with the classifiers and sends no gradient into the backbones. With few images it
    is the worse one (``docs/experiments/attention.md``).

    Training alternates by epochs (see `phase_of`), so a run needs at least eleven to go through every phase.

    Args:
        backbone: a convolutional classifier; finer scales start as copies of it.
        mean: see `Network`.
        std: see `Network`.
        options: an `RACNNOptions`; None takes the defaults.
    """

    summary: ClassVar[str] = "crops and zooms twice on the telling region, learned from the classes alone"
    paper: ClassVar[str] = "Fu et al. 2017"
    Options: ClassVar[type[msgspec.Struct]] = RACNNOptions
    single_pass: ClassVar[bool] = False

    def __init__(self, backbone: nn.Module, mean: Triple, std: Triple, options: msgspec.Struct | None = None) -> None:
        super().__init__(backbone, mean, std, options)
        self._settings = cast(RACNNOptions, self.options)
        finer = 0 if self._settings.shared else _SCALES - 1
        self.finer = nn.ModuleList([copy.deepcopy(backbone) for _ in range(finer)])
        self.proposals = nn.ModuleList(
            [ProposalNetwork(parts.channels(backbone), self._settings) for _ in range(_SCALES - 1)]
        )
        width = cast(torch.Tensor, parts.head_of(backbone).weight).shape[1]
        learned = self._settings.fusion == "learned"
        self.fusion = nn.Linear(_SCALES * width, parts.classes_of(backbone)) if learned else None
        self.phase = Phase.CLASSIFY

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits, ``float32 [N, classes]``, fused over the three scales."""
        return self._fuse(self._look_closer(images, _SCALES))

    def logits_and_maps(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits, fused over the three scales, and the last maps of the first one."""
        looks = self._look_closer(images, _SCALES)
        return self._fuse(looks), looks[0].maps

    def loss(self, batch: Batch, criterion: Criterion) -> Step:
        """Return the loss of the epoch's phase: cross entropies, the peak's boxes, or the rank loss."""
        # The peak of the second scale needs no third one.
        looks = self._look_closer(batch.images, _SCALES - 1 if self.phase is Phase.PEAK else _SCALES)
        whole = looks[0]
        if self.phase is Phase.CLASSIFY:
            every = [look.logits for look in looks] + ([self._fuse(looks)] if self.fusion is not None else [])
            loss = torch.stack([criterion(logits, batch) for logits in every]).sum()
        elif self.phase is Phase.PEAK:
            apart = [F.smooth_l1_loss(cast(torch.Tensor, look.box), peak_box(look.maps), beta=0.1) for look in looks]
            loss = torch.stack(apart).sum()
        else:
            loss = rank_loss([true_probability(look.logits, batch) for look in looks], self._settings.margin)
        return Step(loss, whole.logits, whole.embedding)

    @torch.no_grad()
    def attention(self, images: torch.Tensor) -> Attention:
        """Return the boxes that scales 2 and 3 see of the image, and the mean of the whole image's last maps."""
        first, second, *_ = self._look_closer(images, _SCALES - 1)
        outer, inner = cast(torch.Tensor, first.box), cast(torch.Tensor, second.box)
        boxes = torch.stack([outer, within(outer, inner)], dim=1).float()
        centre, half = boxes[..., :2], boxes[..., 2:]
        corners = torch.cat([centre - half, centre + half], dim=2)
        return Attention(scaled(first.maps.mean(dim=1, keepdim=True)), corners, ("scale 2", "scale 3"))

    def new_modules(self) -> Sequence[nn.Module]:
        """List the classifiers and, where it is learned, the fusion.

        The proposal networks start untrained too, but learn their boxes better at the rate of the backbones.
        """
        heads = map(parts.head_of, [self.backbone, *self.finer])
        return [*heads, *([] if self.fusion is None else [self.fusion])]

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Choose the epoch's phase and freeze what does not learn in it; frozen norms keep their statistics.

        Call it after ``train()`` and after the parameters that may learn were set to, as the loop does: it thaws only
        the proposal networks.
        """
        self.phase = phase_of(epoch, epochs, self._settings)
        self.proposals.requires_grad_(self.phase is not Phase.CLASSIFY)
        if self.phase is Phase.CLASSIFY:
            return
        for child in self.children():
            if child is not self.proposals:
                child.requires_grad_(False).eval()

    def classifies_in(self, epoch: int, epochs: int) -> bool:
        """Whether the epoch is the classifiers' and comes after the proposals' first: patience counts no others."""
        first = next((e for e in range(epochs) if phase_of(e, epochs, self._settings) is not Phase.CLASSIFY), 0)
        return epoch >= first and phase_of(epoch, epochs, self._settings) is Phase.CLASSIFY

    def _look_closer(self, images: torch.Tensor, scales: int) -> list[_Look]:
        """Look at an image and at ever smaller parts of it.

        A proposal network's gradient comes from the next scale alone, and ends at the maps and the crop that it works
        on; so backbones learn only from their classifiers.
        """
        planes = self.normalised(images)
        height, width = planes.shape[2:]
        shares = (1.0, self._settings.size2, self._settings.size3)
        backbones = [self.backbone, *self.finer] if self.finer else [self.backbone] * _SCALES
        looks: list[_Look] = []
        for scale in range(scales):
            found = parts.maps(backbones[scale], planes)
            embedded = parts.embedding(backbones[scale], found)
            logits = parts.classify(backbones[scale], embedded)
            box = self.proposals[scale](found.detach()) if scale < _SCALES - 1 else None
            looks.append(_Look(found, embedded, logits, box))
            if box is not None and scale + 1 < scales:
                size = (round(height * shares[scale + 1]), round(width * shares[scale + 1]))
                followed = box if self.phase is Phase.RANK else box.detach()
                planes = zoom(planes.detach(), followed, size, self._settings.steepness)
        return looks

    def _fuse(self, looks: Sequence[_Look]) -> torch.Tensor:
        if self.fusion is None:
            return mean_logits([look.logits for look in looks])
        # Normalised to the root of the width: elements of about 1, so that the layer learns at an ordinary rate.
        embedded = [look.embedding.detach() for look in looks]
        descriptors = [F.normalize(e, dim=1) * math.sqrt(e.shape[1]) for e in embedded]
        return cast(torch.Tensor, self.fusion(torch.cat(descriptors, dim=1)))


def phase_of(epoch: int, epochs: int, options: RACNNOptions) -> Phase:
    """Return what learns in epoch ``epoch`` (from 0) of ``epochs``.

    First the classifiers learn on centre crops (``warm_share``), then the proposal networks the peak of the maps, then
    both go by turns, as in the paper. The first and the last epoch after the peak are always the classifiers': the
    rank loss needs classifiers that know something, and the prediction classifiers that have seen the final crops.
    With 40 % of the epochs before the proposals, accuracy on synthetic birds was 3 points higher on ``val`` than with
    none (three seeds, ``docs/experiments/attention.md``).
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
