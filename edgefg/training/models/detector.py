"""A detector of parts over any convolutional backbone: torchvision's Faster R-CNN on a feature pyramid."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, clip_boxes_to_image

from edgefg.training.models import backbone as parts

Levels = dict[str, torch.Tensor]
"""Feature maps by the logarithm (base 2) of their stride, finest first."""

_ANCHORS = (2, 4, 8)
"""Sides of the anchors in strides of their map: 16 to 256 px over strides 8 to 32, for inputs of 96 to 448 px."""
_RATIOS = (0.5, 1.0, 2.0)


def find_levels(backbone: nn.Module, finest: int) -> dict[str, tuple[str, int]]:
    """Find the last maps that a backbone makes at each stride from ``finest`` on.

    Returns:
        Level (log2 of the stride, as text) → name of the module that gives the maps, and their channels.

    Raises:
        WeightsError: the backbone has no maps.
    """
    planes = parts.example_planes(backbone)
    found: dict[str, tuple[str, int]] = {}

    def note(name: str, given: object) -> None:
        if isinstance(given, torch.Tensor) and given.ndim == 4 and min(given.shape[2:]) > 1:
            level = round(math.log2(planes.shape[2] / given.shape[2]))
            if level >= math.log2(finest):
                found[str(level)] = (name, given.shape[1])

    handles = [
        module.register_forward_hook(lambda _, __, given, name=name: note(name, given))
        for name, module in backbone.named_modules()
        if name
    ]
    training = backbone.training
    backbone.eval()  # the norms' statistics must not learn from the example
    with torch.no_grad():
        parts.maps(backbone, planes)
    backbone.train(training)
    for handle in handles:
        handle.remove()
    return dict(sorted(found.items(), key=lambda item: int(item[0])))


class _Proposer(RegionProposalNetwork):  # type: ignore[misc]
    """torchvision's proposals; an image without true boxes teaches it nothing, since its parts may just be unmarked."""

    def assign_targets_to_anchors(
        self, anchors: list[torch.Tensor], targets: list[dict[str, torch.Tensor]]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Match anchors with true boxes; the losses pass over those whose label is −1."""
        labels, boxes = super().assign_targets_to_anchors(anchors, targets)
        for own, target in zip(labels, targets, strict=True):
            if not len(target["boxes"]):
                own.fill_(-1)
        return labels, boxes


class PartDetector(nn.Module):
    """Proposals, scores and boxes of parts; part i has the detector's class i + 1.

    Args:
        levels: what `find_levels` gave.
        count: number of parts, the object included.
        width: channels of the pyramid.
        proposals: regions kept for an image.
    """

    def __init__(self, levels: dict[str, tuple[str, int]], count: int, *, width: int, proposals: int) -> None:
        super().__init__()
        self._layers = {level: name for level, (name, _) in levels.items()}
        self.pyramid = FeaturePyramidNetwork([channels for _, channels in levels.values()], width)
        sizes = tuple(tuple(side * 2 ** int(level) for side in _ANCHORS) for level in levels)
        anchors = AnchorGenerator(sizes, (_RATIOS,) * len(levels))
        kept = {"training": proposals, "testing": proposals}
        before = {mode: 4 * number for mode, number in kept.items()}
        # An anchor that half covers a small part is a good start already, hence 0.5 in place of 0.7.
        head = RPNHead(width, len(_ANCHORS) * len(_RATIOS))
        self.proposer = _Proposer(anchors, head, 0.5, 0.3, 128, 0.5, before, kept, 0.7)
        hidden = 2 * width
        pool = MultiScaleRoIAlign(list(levels), output_size=7, sampling_ratio=2)
        # What follows at test is `candidates`, not the heads' own suppression: the last three are unused.
        self.heads = RoIHeads(
            *(pool, TwoMLPHead(width * 49, hidden), FastRCNNPredictor(hidden, count + 1)),
            *(0.5, 0.5, 64, 0.25, None),
            *(0.0, 1.0, proposals),
        )

    @contextmanager
    def listen(self, backbone: nn.Module) -> Iterator[Levels]:
        """Collect the maps of the pyramid's levels while the backbone runs on one batch."""
        heard: Levels = {}

        def keep(level: str, given: torch.Tensor) -> None:
            heard[level] = given

        handles = [
            backbone.get_submodule(name).register_forward_hook(lambda _, __, given, level=level: keep(level, given))
            for level, name in self._layers.items()
        ]
        try:
            yield heard
        finally:
            for handle in handles:
                handle.remove()

    def propose(
        self, heard: Levels, planes: torch.Tensor, boxes: torch.Tensor | None
    ) -> tuple[Levels, list[torch.Tensor], torch.Tensor]:
        """Return the pyramid's maps, regions ``float [R, 4]`` of every image and, in training, the detection loss.

        Args:
            heard: what `listen` collected.
            planes: ``float [N, 3, H, W]``.
            boxes: true boxes, ``float [N, parts, 4]`` in pixels, NaN where absent; None outside training. Images
                without any are left out of the loss, which is 0 where all of them are.
        """
        found = cast(Levels, self.pyramid({level: heard[level].float() for level in self._layers}))
        sizes = [tuple(planes.shape[2:])] * len(planes)
        targets = None if boxes is None else [_target(own) for own in boxes.float()]
        proposals, losses = self.proposer(ImageList(planes, cast(Any, sizes)), found, targets)
        marked = [i for i, target in enumerate(targets or []) if len(target["boxes"])]
        if targets is None or not marked:
            return found, proposals, planes.new_zeros(())  # torchvision's means over no anchor are NaN
        own = {level: maps[marked] for level, maps in found.items()}
        losses |= self.heads(own, *([of[i] for i in marked] for of in (proposals, sizes, targets)))[1]
        return found, proposals, sum(losses.values(), planes.new_zeros(()))

    @torch.no_grad()
    def candidates(
        self, found: Levels, proposals: list[torch.Tensor], size: tuple[int, int]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return, for every image, its regions as each part, ``float [R, parts, 4]``, and scores ``[R, parts]``."""
        pooled = self.heads.box_roi_pool(found, proposals, [size] * len(proposals))
        logits, moves = self.heads.box_predictor(self.heads.box_head(pooled))
        boxes = clip_boxes_to_image(self.heads.box_coder.decode(moves.float(), proposals), size)[:, 1:]
        scores = logits.float().softmax(dim=1)[:, 1:]
        counts = [len(own) for own in proposals]
        return list(zip(boxes.split(counts), scores.split(counts), strict=True))


def _target(boxes: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return one image's true boxes as torchvision's detectors take them."""
    # A part cut down to a line has no area to find.
    there = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(dim=1)
    return {"boxes": boxes[there], "labels": there.nonzero().flatten() + 1}
