"""Part R-CNN: detects the object and its parts, and classifies their concatenated features.

Zhang, Donahue, Girshick & Darrell 2014, "Part-based R-CNNs for Fine-grained Category Detection". A region
proposal network on the shared backbone replaces selective search. Boxes are needed in training only.
"""

from __future__ import annotations

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
from edgefg.log import get_logger
from edgefg.training.models import backbone as backbones
from edgefg.training.models.backbone import Triple
from edgefg.training.models.detector import PartDetector, find_levels
from edgefg.training.models.geometry import Constraint, PositionPrior, best_configuration
from edgefg.training.models.network import Attention, Batch, Criterion, Network, Step, full_precision

_log = get_logger(__name__)
# Side of regions that are pooled from feature maps, in cells, as in Fast R-CNN.
_CELLS = 7


class PartRCNNOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of Part R-CNN."""

    parts: Annotated[str, Meta(description=f"Parts to use, separated by commas. Empty: all in {BOXES_FILE}.")] = ""
    regions: Annotated[
        Literal["image", "maps"],
        Meta(description="Crop regions from the image and run the backbone on them (R-CNN), or from its maps (fast)."),
    ] = "image"
    region_size: Annotated[
        float, Meta(description="Side of a cropped region, relative to the network input.", gt=0, le=1)
    ] = 1.0
    context: Annotated[
        float, Meta(description="Margin on each side of a region, relative to its side.", ge=0, le=1)
    ] = 0.07
    epsilon: Annotated[
        float, Meta(description="Distance in pixels by which a part may extend beyond its object.", ge=0)
    ] = 10.0
    alpha: Annotated[float, Meta(description="Weight of the position prior. 0: box constraint only.", ge=0)] = 0.1
    threshold: Annotated[float, Meta(description="A part with a lower score is absent.", gt=0, lt=1)] = 0.05
    objects: Annotated[int, Meta(description="Object boxes that are tried per image.", ge=1)] = 10
    proposals: Annotated[int, Meta(description="Regions that are scored per image.", ge=1)] = 100
    stride: Annotated[int, Meta(description="Stride of the finest maps of the detector: 4, 8 or 16.", ge=2, le=32)] = 8
    width: Annotated[int, Meta(description="Channels of the detector's feature pyramid.", ge=8)] = 128
    detection_weight: Annotated[float, Meta(description="Weight of the detection losses.", gt=0)] = 1.0
    detected: Annotated[
        float,
        Meta(
            description="Share of training images that are classified with detected instead of ground-truth boxes.",
            ge=0,
            le=1,
        ),
    ] = 0.5


class PartRCNN(Network):
    """Part R-CNN.

    The head of the backbone is widened for the concatenated features. Features of an absent part are zeros. The whole
    image replaces an absent object.

    Raises:
        DataError: the options name no parts (see `prepare`), or not the object.
        WeightsError: the backbone has no feature maps.
    """

    summary: ClassVar[str] = (
        "detects the object and its parts (trained on boxes), and classifies their concatenated features"
    )
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
        """Take the parts from the data, and select the boxes of the parts that the options name.

        Boxes of images without a box of the object are dropped: to the detector, an object that was not annotated would
        be background. A warning says how many images there are.

        Raises:
            DataError: the data have no boxes, or none of a part, or no training image has a box of the object.
        """
        assert isinstance(options, PartRCNNOptions)
        if data.boxes is None:
            raise DataError(
                f"{data.root} has no {BOXES_FILE}, which partrcnn needs in training. Add one with boxes of the object"
                " and its parts (columns path,part,x0,y0,x1,y1)"
            )
        options = replace(options, parts=options.parts or ",".join(data.parts))
        names = _names(options)
        boxes = choose_parts(data.parts, data.boxes, names)
        boxes = {image: found for image, found in boxes.items() if not np.isnan(found[0]).any()}
        _warn_of_unannotated(data, boxes)
        return options, replace(data, parts=names, boxes=boxes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Detect the parts, classify them, and return the logits."""
        return backbones.classify(self.backbone, self.features(images))

    def logits_and_maps(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits, and the last feature maps of the whole images."""
        planes = self.normalised(images)
        maps, boxes, _ = self._detect(planes, None)
        return backbones.classify(self.backbone, self._embed(planes, maps, boxes)), maps

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Return the concatenated features of object and parts, ``float32 [N, parts × D]``."""
        planes = self.normalised(images)
        maps, boxes, _ = self._detect(planes, None)
        return self._embed(planes, maps, boxes)

    def attention(self, images: torch.Tensor) -> Attention:
        """Return the boxes of object and parts. NaN: not found."""
        planes = self.normalised(images)
        boxes = self._detect(planes, None)[1]
        height, width = planes.shape[2:]
        return Attention(None, boxes / boxes.new_tensor([width, height, width, height]), self.names)

    def loss(self, batch: Batch, criterion: Criterion) -> Step:
        """Return the sum of the detection losses and the classification loss, which uses some detected boxes.

        Raises:
            DataError: the batch has no boxes, or boxes of another number of parts.
        """
        if batch.boxes is None or batch.boxes.shape[1] != len(self.names):
            have = "no boxes" if batch.boxes is None else f"boxes of {batch.boxes.shape[1]} parts"
            raise DataError(f"the batch has {have}, but partrcnn needs boxes of {', '.join(self.names)}")
        planes = self.normalised(batch.images)
        self.prior.update(batch.boxes)
        maps, detected, detection_loss = self._detect(planes, batch.boxes)
        from_detector = torch.rand(len(planes), 1, 1, device=planes.device) < self.options.detected
        boxes = torch.where(from_detector, detected, batch.boxes)
        embedding = self._embed(planes, maps, boxes)
        logits = backbones.classify(self.backbone, embedding)
        loss = criterion(logits, batch) + self.options.detection_weight * detection_loss
        return Step(loss, logits, embedding)

    def new_modules(self) -> Sequence[nn.Module]:
        """List the classifier and the detector."""
        return [backbones.head_of(self.backbone), self.detector]

    def _detect(
        self, planes: torch.Tensor, true: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the last maps, the boxes ``float [N, parts, 4]`` in pixels and, in training, the detection loss."""
        with self.detector.capture(self.backbone) as captured:
            maps = backbones.maps(self.backbone, planes)
        size = (planes.shape[2], planes.shape[3])
        # torchvision keeps boxes in the precision of the maps. Beyond 256, bfloat16 has even pixels only.
        with full_precision(planes):
            found, proposals, loss = self.detector.propose(captured, planes, true)
            candidates = self.detector.candidates(found, proposals, size)
        boxes = [best_configuration(*own, self.prior, self._constraint) for own in candidates]
        return maps, torch.stack(boxes), loss

    def _embed(self, planes: torch.Tensor, maps: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """Return the concatenated features of the regions, ``float [N, parts × D]``."""
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
            pooled = backbones.maps(self.backbone, warped)
        else:
            scale = maps.shape[2] / height
            pooled = roi_align(maps, list(regions.to(maps)), _CELLS, scale, sampling_ratio=2, aligned=True)
        vectors = backbones.embedding(self.backbone, pooled)
        # The whole image replaces an object that was not found.
        absent = absent & (torch.arange(len(self.names), device=absent.device) > 0)
        return vectors.masked_fill(absent.flatten()[:, None], 0).view(len(boxes), -1)


def _names(options: PartRCNNOptions) -> tuple[str, ...]:
    names = tuple(name.strip() for name in options.parts.split(",") if name.strip())
    if OBJECT not in names:
        have = f"the parts {', '.join(names)}" if names else "no parts"
        raise DataError(f"partrcnn was given {have}. Give {OBJECT!r} and its parts, as in {BOXES_FILE}")
    if len(set(names)) != len(names):
        raise DataError(f"partrcnn was given a part twice: {options.parts}. Give each once")
    return tuple(sorted(names, key=lambda name: name != OBJECT))


def _warn_of_unannotated(data: ImageDataset, boxes: Collection[Path]) -> None:
    """Warn of training images from which only the classifier learns. Raise `DataError` if these are all."""
    training = data.splits["train"]
    unannotated = [sample.path for sample in training if sample.path not in boxes]
    if len(unannotated) == len(training):
        raise DataError(f"none of the {len(training)} training images of {data.root} has a box of {OBJECT!r}. Add some")
    if unannotated:
        _log.warning(
            "%d of %d training images have no box of %r (first: %s): the classifier learns from them, the detector does"
            " not",
            len(unannotated),
            len(training),
            OBJECT,
            relative_name(unannotated[0], data.root),
        )


def _widen_head(backbone: nn.Module, count: int) -> None:
    """Replace the backbone's head by one for the concatenated features of ``count`` regions."""
    head = backbones.head_of(backbone)
    name = next(name for name, module in backbone.named_modules() if module is head)
    training = backbone.training
    backbone.eval()
    planes = backbones.example_planes(backbone)
    with torch.no_grad():
        width = backbones.embedding(backbone, backbones.maps(backbone, planes)).shape[1]
    backbone.train(training)
    backbone.set_submodule(name, nn.Linear(count * width, backbones.classes_of(backbone)))
