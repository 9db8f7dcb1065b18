"""Part R-CNN: the object and its parts are found, and a classifier reads the features of all of them side by side.

Zhang, Donahue, Girshick & Darrell 2014, "Part-based R-CNNs for Fine-grained Category Detection". Selective search is
replaced by a region proposal network on the shared backbone; boxes are needed in training, never at test.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import msgspec
import numpy as np
import torch
from msgspec import Meta
from msgspec.structs import replace
from torch import nn
from torchvision.ops import roi_align

from edgefg.data import ImageDataset
from edgefg.data.boxes import OBJECT, choose_parts
from edgefg.data.index import BOXES_FILE
from edgefg.data.split import relative_name
from edgefg.errors import DataError
from edgefg.training.models import backbone as layers
from edgefg.training.models.backbone import Triple
from edgefg.training.models.detector import PartDetector, find_levels
from edgefg.training.models.geometry import Constraint, PositionPrior, best_configuration
from edgefg.training.models.network import Attention, Batch, Criterion, Network, Step, full_precision

# Cells of a region pooled from maps, a side, as in Fast R-CNN.
_CELLS = 7


class PartRCNNOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of Part R-CNN."""

    parts: Annotated[str, Meta(description=f"parts to use, by comma; empty: all of {BOXES_FILE}")] = ""
    regions: Annotated[
        Literal["image", "maps"],
        Meta(description="warp regions of the image and run the backbone on them (R-CNN), or pool its maps (fast)"),
    ] = "image"
    region_size: Annotated[
        float, Meta(description="side of a warped region, as a share of the network input's", gt=0, le=1)
    ] = 1.0
    context: Annotated[float, Meta(description="added to a region on each side, share of its own", ge=0, le=1)] = 0.07
    epsilon: Annotated[float, Meta(description="pixels by which a part may leave its object", ge=0)] = 10.0
    alpha: Annotated[float, Meta(description="weight of the prior of position; 0: box constraint only", ge=0)] = 0.1
    threshold: Annotated[float, Meta(description="a part that scores less is absent", gt=0, lt=1)] = 0.05
    objects: Annotated[int, Meta(description="object boxes tried in an image", ge=1)] = 10
    proposals: Annotated[int, Meta(description="regions scored in an image", ge=1)] = 100
    stride: Annotated[int, Meta(description="of the finest maps that parts are found on: 4, 8, 16", ge=2, le=32)] = 8
    width: Annotated[int, Meta(description="channels of the detector's feature pyramid", ge=8)] = 128
    detection_weight: Annotated[float, Meta(description="weight of the detection losses", gt=0)] = 1.0
    detected: Annotated[
        float, Meta(description="share of training images classified by detections, not true boxes", ge=0, le=1)
    ] = 0.5


class PartRCNN(Network):
    """Part R-CNN.

    The backbone's own head becomes the classifier of the concatenated features. A part that is absent adds zeros; where
    the object is, the whole image stands for it.

    Raises:
        DataError: the options name no parts (see `prepare`), or ``object`` is not the first of them.
        WeightsError: the backbone has no feature maps.
    """

    summary: ClassVar[str] = "finds the object and its parts (trained on boxes) and classifies them side by side"
    paper: ClassVar[str] = "Zhang et al. 2014"
    Options: ClassVar[type[msgspec.Struct]] = PartRCNNOptions
    single_pass: ClassVar[bool] = False
    needs_boxes: ClassVar[bool] = True
    options: PartRCNNOptions

    def __init__(self, backbone: nn.Module, mean: Triple, std: Triple, options: msgspec.Struct | None = None) -> None:
        super().__init__(backbone, mean, std, options)
        self.names = _names(self.options)
        o = self.options
        found = find_levels(backbone, o.stride)
        self.detector = PartDetector(found, len(self.names), width=o.width, proposals=o.proposals)
        self.prior = PositionPrior(len(self.names) - 1)
        self._constraint = Constraint(o.epsilon, o.alpha, o.threshold, o.objects)
        _widen_head(backbone, len(self.names))

    @classmethod
    def prepare(cls, options: msgspec.Struct, data: ImageDataset) -> tuple[msgspec.Struct, ImageDataset]:
        """Take the parts from the data, and of the data's boxes those of the parts that the options name.

        Images without a box of the object lose those of their parts too, so that the detector learns nothing from them:
        an object that no one marked would be background to it. Says on standard error how many there are.

        Raises:
            DataError: the data have no boxes, none of a part, or no training image has one of the object.
        """
        assert isinstance(options, PartRCNNOptions)
        if data.boxes is None:
            raise DataError(
                f"{data.root} has no {BOXES_FILE}; partrcnn needs boxes of the object and its parts to train on"
                " (columns path,part,x0,y0,x1,y1)"
            )
        options = replace(options, parts=options.parts or ",".join(data.parts))
        names = _names(options)
        boxes = choose_parts(data.parts, data.boxes, names)
        boxes = {image: found for image, found in boxes.items() if not np.isnan(found[0]).any()}
        _warn_of_unmarked(data, boxes)
        return options, replace(data, parts=names, boxes=boxes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits: find the parts, then classify them."""
        return layers.classify(self.backbone, self.features(images))

    def logits_and_maps(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits, and the last maps of whole images, which the parts are cut out of."""
        planes = self.normalised(images)
        maps, boxes, _ = self._detect(planes, None)
        return layers.classify(self.backbone, self._describe(planes, maps, boxes)), maps

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Return the features of object and parts side by side, ``float32 [N, parts × D]``."""
        planes = self.normalised(images)
        maps, boxes, _ = self._detect(planes, None)
        return self._describe(planes, maps, boxes)

    def attention(self, images: torch.Tensor) -> Attention:
        """Return the boxes of object and parts; NaN where a part is not found."""
        planes = self.normalised(images)
        boxes = self._detect(planes, None)[1]
        height, width = planes.shape[2:]
        return Attention(None, boxes / boxes.new_tensor([width, height, width, height]), self.names)

    def loss(self, batch: Batch, criterion: Criterion) -> Step:
        """Return the detection losses plus the classification loss on true boxes and, for a share, detected ones.

        Raises:
            DataError: the batch has no boxes, or those of another number of parts.
        """
        if batch.boxes is None or batch.boxes.shape[1] != len(self.names):
            have = "no boxes" if batch.boxes is None else f"boxes of {batch.boxes.shape[1]} parts"
            raise DataError(f"the batch has {have}; partrcnn needs those of {', '.join(self.names)}")
        planes = self.normalised(batch.images)
        self.prior.update(batch.boxes)
        maps, detected, detection_loss = self._detect(planes, batch.boxes)
        from_detector = torch.rand(len(planes), 1, 1, device=planes.device) < self.options.detected
        boxes = torch.where(from_detector, detected, batch.boxes)
        embedding = self._describe(planes, maps, boxes)
        logits = layers.classify(self.backbone, embedding)
        loss = criterion(logits, batch) + self.options.detection_weight * detection_loss
        return Step(loss, logits, embedding)

    def new_modules(self) -> Sequence[nn.Module]:
        """List the classifier and the detector."""
        return [layers.head_of(self.backbone), self.detector]

    def _detect(
        self, planes: torch.Tensor, true: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the last maps, the parts' boxes ``float [N, parts, 4]`` in pixels, and the loss given true boxes."""
        with self.detector.listen(self.backbone) as heard:
            maps = layers.maps(self.backbone, planes)
        size = (planes.shape[2], planes.shape[3])
        # torchvision keeps boxes in the maps' precision, and bfloat16 knows even pixels only beyond 256.
        with full_precision(planes):
            found, proposals, loss = self.detector.propose(heard, planes, true)
            candidates = self.detector.candidates(found, proposals, size)
        boxes = [best_configuration(*own, self.prior, self._constraint) for own in candidates]
        return maps, torch.stack(boxes), loss

    def _describe(self, planes: torch.Tensor, maps: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """Return the features of the regions side by side, ``float [N, parts × D]``."""
        absent = boxes.isnan().any(dim=2)
        height, width = planes.shape[2:]
        limit = boxes.new_tensor([width, height, width, height])
        whole = torch.cat([torch.zeros_like(limit[:2]), limit[:2]])
        margin = self.options.context * (boxes[..., 2:] - boxes[..., :2])
        regions = (boxes + torch.cat([-margin, margin], dim=2)).clamp(torch.zeros_like(limit), limit)
        regions = torch.where(absent[..., None], whole, regions)
        if self.options.regions == "image":
            size = (round(height * self.options.region_size), round(width * self.options.region_size))
            warped = roi_align(planes, list(regions), size, sampling_ratio=2, aligned=True)
            pooled = layers.maps(self.backbone, warped)
        else:
            scale = maps.shape[2] / height
            pooled = roi_align(maps, list(regions.to(maps)), _CELLS, scale, sampling_ratio=2, aligned=True)
        vectors = layers.embedding(self.backbone, pooled)
        # The whole image stands for an object that was not found.
        absent = absent & (torch.arange(len(self.names), device=absent.device) > 0)
        return vectors.masked_fill(absent.flatten()[:, None], 0).view(len(boxes), -1)


def _names(options: PartRCNNOptions) -> tuple[str, ...]:
    names = tuple(name.strip() for name in options.parts.split(",") if name.strip())
    if OBJECT not in names:
        have = f"the parts {', '.join(names)}" if names else "no parts"
        raise DataError(f"partrcnn was given {have}; needed {OBJECT!r} and its parts, as in {BOXES_FILE}")
    if len(set(names)) != len(names):
        raise DataError(f"partrcnn was given a part twice: {options.parts}")
    return tuple(sorted(names, key=lambda name: name != OBJECT))


def _warn_of_unmarked(data: ImageDataset, boxes: Collection[Path]) -> None:
    """Say in one line on standard error how many training images teach the classifier alone; raise if all do."""
    training = data.splits["train"]
    unmarked = [sample.path for sample in training if sample.path not in boxes]
    if len(unmarked) == len(training):
        raise DataError(f"none of the {len(training)} training images of {data.root} has a box of {OBJECT!r}; add some")
    if unmarked:
        print(
            f"warning: {len(unmarked)} of {len(training)} training images have no box of {OBJECT!r} (first:"
            f" {relative_name(unmarked[0], data.root)}); only the classifier learns from them, not the detector",
            file=sys.stderr,
        )


def _widen_head(backbone: nn.Module, count: int) -> None:
    """Replace the backbone's head by one that reads the features of ``count`` regions."""
    head = layers.head_of(backbone)
    name = next(name for name, module in backbone.named_modules() if module is head)
    training = backbone.training
    backbone.eval()
    planes = layers.example_planes(backbone)
    with torch.no_grad():
        width = layers.embedding(backbone, layers.maps(backbone, planes)).shape[1]
    backbone.train(training)
    backbone.set_submodule(name, nn.Linear(count * width, layers.classes_of(backbone)))
