"""Detector of object and parts on any convolutional backbone: torchvision's Faster R-CNN with a feature pyramid."""

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

from edgefg.training.models import backbone as backbones

Levels = dict[str, torch.Tensor]
"""Feature maps by log2 of their stride (as text), finest first."""

_ANCHORS = (2, 4, 8)
"""Sides of the anchors in units of the stride: 16 to 256 px for strides 8 to 32 and inputs of 96 to 448 px."""
_RATIOS = (0.5, 1.0, 2.0)


def find_levels(backbone: nn.Module, finest: int) -> dict[str, tuple[str, int]]:
    """Find the last feature maps of each stride from ``finest`` on.

    Returns:
        Level (log2 of the stride, as text) → name of the module whose output the maps are, and their channels.

    Raises:
        WeightsError: the backbone has no feature maps.
    """
    planes = backbones.example_planes(backbone)
    found: dict[str, tuple[str, int]] = {}

    def record(name: str, output: object) -> None:
        if isinstance(output, torch.Tensor) and output.ndim == 4 and min(output.shape[2:]) > 1:
            level = round(math.log2(planes.shape[2] / output.shape[2]))
            if level >= math.log2(finest):
                found[str(level)] = (name, output.shape[1])

    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: record(name, output))
        for name, module in backbone.named_modules()
        if name
    ]
    training = backbone.training
    backbone.eval()  # the example must not change the statistics of the norms
    with torch.no_grad():
        backbones.maps(backbone, planes)
    backbone.train(training)
    for handle in handles:
        handle.remove()
    return dict(sorted(found.items(), key=lambda item: int(item[0])))


class _Proposer(RegionProposalNetwork):  # type: ignore[misc]
    """torchvision's proposals. An image without boxes is not used as background: its parts may just be unannotated."""

    def assign_targets_to_anchors(
        self, anchors: list[torch.Tensor], targets: list[dict[str, torch.Tensor]]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Match anchors with ground-truth boxes. Anchors with label −1 are left out of the losses."""
        labels, boxes = super().assign_targets_to_anchors(anchors, targets)
        for own, target in zip(labels, targets, strict=True):
            if not len(target["boxes"]):
                own.fill_(-1)
        return labels, boxes


class PartDetector(nn.Module):
    """Faster R-CNN for object and parts. Part i is class i + 1.

    Args:
        levels: see `find_levels`.
        count: number of parts, including the object.
        width: channels of the feature pyramid.
        proposals: regions per image.
    """

    def __init__(self, levels: dict[str, tuple[str, int]], count: int, *, width: int, proposals: int) -> None:
        super().__init__()
        self._layers = {level: name for level, (name, _) in levels.items()}
        self.pyramid = FeaturePyramidNetwork([channels for _, channels in levels.values()], width)
        sizes = tuple(tuple(side * 2 ** int(level) for side in _ANCHORS) for level in levels)
        anchors = AnchorGenerator(sizes, (_RATIOS,) * len(levels))
        kept = {"training": proposals, "testing": proposals}
        before = {mode: 4 * number for mode, number in kept.items()}
        # 0.5 instead of 0.7: for small parts, an anchor with that overlap is good enough.
        head = RPNHead(width, len(_ANCHORS) * len(_RATIOS))
        self.proposer = _Proposer(anchors, head, 0.5, 0.3, 128, 0.5, before, kept, 0.7)
        hidden = 2 * width
        pool = MultiScaleRoIAlign(list(levels), output_size=7, sampling_ratio=2)
        # At test time `candidates` replaces the suppression of the heads: the last three arguments are not used.
        self.heads = RoIHeads(
            *(pool, TwoMLPHead(width * 49, hidden), FastRCNNPredictor(hidden, count + 1)),
            *(0.5, 0.5, 64, 0.25, None),
            *(0.0, 1.0, proposals),
        )

    @contextmanager
    def capture(self, backbone: nn.Module) -> Iterator[Levels]:
        """Collect the backbone's maps for the feature pyramid while it runs on a batch."""
        captured: Levels = {}

        def keep(level: str, output: torch.Tensor) -> None:
            captured[level] = output

        handles = [
            backbone.get_submodule(name).register_forward_hook(lambda _, __, output, level=level: keep(level, output))
            for level, name in self._layers.items()
        ]
        try:
            yield captured
        finally:
            for handle in handles:
                handle.remove()

    def propose(
        self, captured: Levels, planes: torch.Tensor, boxes: torch.Tensor | None
    ) -> tuple[Levels, list[torch.Tensor], torch.Tensor]:
        """Return the pyramid's maps, the regions of every image ``float [R, 4]`` and, in training, the detection loss.

        Args:
            captured: see `capture`.
            planes: ``float [N, 3, H, W]``.
            boxes: ground-truth boxes, ``float [N, parts, 4]`` in pixels, NaN if absent. None: not in training. Images
                without boxes are left out of the loss, which is 0 if no image has any.
        """
        found = cast(Levels, self.pyramid({level: captured[level].float() for level in self._layers}))
        sizes = [tuple(planes.shape[2:])] * len(planes)
        targets = None if boxes is None else [_target(own) for own in boxes.float()]
        proposals, losses = self.proposer(ImageList(planes, cast(Any, sizes)), found, targets)
        annotated = [i for i, target in enumerate(targets or []) if len(target["boxes"])]
        if targets is None or not annotated:
            return found, proposals, planes.new_zeros(())  # torchvision's mean over no anchors is NaN
        own = {level: maps[annotated] for level, maps in found.items()}
        losses |= self.heads(own, *([of[i] for i in annotated] for of in (proposals, sizes, targets)))[1]
        return found, proposals, sum(losses.values(), planes.new_zeros(()))

    @torch.no_grad()
    def candidates(
        self, found: Levels, proposals: list[torch.Tensor], size: tuple[int, int]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the boxes of each image's regions for every part, ``float [R, parts, 4]``, and their scores."""
        pooled = self.heads.box_roi_pool(found, proposals, [size] * len(proposals))
        logits, moves = self.heads.box_predictor(self.heads.box_head(pooled))
        boxes = clip_boxes_to_image(self.heads.box_coder.decode(moves.float(), proposals), size)[:, 1:]
        scores = logits.float().softmax(dim=1)[:, 1:]
        counts = [len(own) for own in proposals]
        return list(zip(boxes.split(counts), scores.split(counts), strict=True))


def _target(boxes: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the ground-truth boxes of an image in the format of torchvision's detectors."""
    # A part that the crop has reduced to a line cannot be detected.
    there = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(dim=1)
    return {"boxes": boxes[there], "labels": there.nonzero().flatten() + 1}
