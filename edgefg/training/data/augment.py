"""Datasets of images: torchvision's augmentation for training, the runtime's preprocessing for evaluation.

Training crops are resized with `edgefg.preprocess.resize` too: a resize filter that differs between training and device
is enough to flip fine-grained labels. Boxes of parts are transformed together with the pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from edgefg.data.split import Sample
from edgefg.image_io import read_image
from edgefg.preprocess import InputSpec, prepare, resize
from edgefg.settings.training import Augmentation

# Image → boxes of its parts, ``float32 [P, 4]``: x0, y0, x1, y1 in pixels of the decoded file. NaN: absent.
Boxes = Mapping[Path, npt.NDArray[np.float32]]
Item = tuple[torch.Tensor, int, torch.Tensor | None, int]

MIN_VISIBLE = 0.5
"""A part counts as absent if less than this share of its area is inside the crop."""
_GREY = 127


class RandomResizedCrop(v2.RandomResizedCrop):  # type: ignore[misc]
    """torchvision's random crop of ``uint8 [3, H, W]`` and boxes, resized with `edgefg.preprocess.resize`."""

    def transform(self, inpt: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
        """Crop and resize an image, or its boxes."""
        if isinstance(inpt, tv_tensors.BoundingBoxes):
            moved: torch.Tensor = super().transform(inpt, params)
            return moved
        top, left = params["top"], params["left"]
        part = inpt[:, top : top + params["height"], left : left + params["width"]].permute(1, 2, 0).numpy()
        return torch.from_numpy(np.ascontiguousarray(resize(part, *self.size))).permute(2, 0, 1)


class DropHidden(v2.Transform):  # type: ignore[misc]
    """Clip boxes to the image. A box that keeps less than `MIN_VISIBLE` of its area becomes NaN."""

    _transformed_types = (tv_tensors.BoundingBoxes,)

    def transform(self, inpt: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
        """Clip the boxes of an image, ``float32 [P, 4]``."""
        height, width = inpt.canvas_size  # type: ignore[attr-defined]
        boxes = inpt.as_subclass(torch.Tensor)
        limit = boxes.new_tensor([width, height, width, height])
        inside = boxes.clamp(min=torch.zeros_like(limit), max=limit)
        # NaN compares false, and stays NaN.
        inside[_area(inside) < MIN_VISIBLE * _area(boxes)] = torch.nan
        wrapped: torch.Tensor = tv_tensors.wrap(inside, like=inpt)
        return wrapped


class ColourRandAugment(v2.RandAugment):  # type: ignore[misc]
    """RandAugment without shears, shifts and rotations, which would not move boxes of parts."""

    _AUGMENTATION_SPACE = {  # noqa: RUF012 (torchvision's own attribute)
        name: operation
        for name, operation in v2.RandAugment._AUGMENTATION_SPACE.items()
        if not name.startswith(("Shear", "Translate", "Rotate"))
    }


def geometric_transform(spec: InputSpec, augmentation: Augmentation) -> v2.Compose:
    """Create the geometric augmentation: random crop, flips, and rotation with grey corners.

    It takes ``uint8 [3, H, W]``, and optionally `tv_tensors.BoundingBoxes` with ``clamping_mode=None``.
    """
    steps: list[v2.Transform] = [
        RandomResizedCrop((spec.height, spec.width), scale=(augmentation.min_area, 1.0), ratio=(3 / 4, 4 / 3)),
        # Again after the rotation: it must not bring back a part that the crop has cut off.
        DropHidden(),
    ]
    if augmentation.flip != "none":
        steps.append(v2.RandomHorizontalFlip())
    if augmentation.flip == "both":
        steps.append(v2.RandomVerticalFlip())
    if augmentation.rotation:
        steps += [v2.RandomRotation(augmentation.rotation, InterpolationMode.BILINEAR, fill=_GREY), DropHidden()]
    return v2.Compose(steps)


def colour_transform(augmentation: Augmentation, *, boxed: bool) -> v2.Compose:
    """Create the colour augmentation of ``uint8 [3, H, W]``: RandAugment, then colour jitter.

    With boxes (``boxed``), RandAugment is limited to operations that do not move pixels.
    """
    kind = ColourRandAugment if boxed else v2.RandAugment
    steps: list[v2.Transform] = []
    if augmentation.randaugment:
        steps.append(kind(2, augmentation.randaugment, interpolation=InterpolationMode.BILINEAR, fill=_GREY))
    if augmentation.color or augmentation.hue:
        color = augmentation.color
        steps.append(v2.ColorJitter(brightness=color, contrast=color, saturation=color, hue=augmentation.hue))
    return v2.Compose(steps or [v2.Identity()])


class TrainingImages(Dataset[Item]):
    """Augmented ``uint8 [H, W, 3]`` RGB images with their labels, boxes of parts (if there are any) and positions.

    Args:
        samples: the images.
        spec: size of the crops.
        augmentation: geometry and colour are used. Mixing is up to the objective. None: defaults.
        boxes: boxes of parts. Items then have them as ``float32 [P, 4]`` in pixels of the crop. NaN: absent.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        spec: InputSpec,
        augmentation: Augmentation | None = None,
        boxes: Boxes | None = None,
    ) -> None:
        self.samples = samples
        augmentation = augmentation or Augmentation()
        self._move = geometric_transform(spec, augmentation)
        self._colour = colour_transform(augmentation, boxed=bool(boxes))
        self._boxes = boxes or None
        self._parts = len(next(iter(boxes.values()))) if boxes else 0

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.samples)

    def __getitem__(self, index: int) -> Item:
        """Decode and augment an image."""
        path, label = self.samples[index]
        image = torch.from_numpy(cv2.cvtColor(read_image(path), cv2.COLOR_BGR2RGB)).permute(2, 0, 1)
        boxes = None
        if self._boxes is None:
            image = self._move(image)
        else:
            image, moved = self._move(image, self._boxes_of(path, image))
            boxes = moved.as_subclass(torch.Tensor)
        # Colour operations are a third faster on contiguous planes.
        image = self._colour(image.contiguous())
        return image.permute(1, 2, 0).contiguous(), label, boxes, index

    def _boxes_of(self, path: Path, image: torch.Tensor) -> tv_tensors.BoundingBoxes:
        assert self._boxes is not None
        found = self._boxes.get(path)
        if found is None:
            found = np.full((self._parts, 4), np.nan, np.float32)
        return tv_tensors.BoundingBoxes(
            torch.from_numpy(found), format="XYXY", canvas_size=tuple(image.shape[1:]), clamping_mode=None
        )


class EvaluationImages(Dataset[tuple[torch.Tensor, int]]):
    """``uint8 [H, W, 3]`` RGB images, preprocessed as by `edgefg.Classifier`, with their labels."""

    def __init__(self, samples: Sequence[Sample], spec: InputSpec) -> None:
        self._samples = samples
        self._spec = spec

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Decode and preprocess an image."""
        path, label = self._samples[index]
        return torch.from_numpy(prepare(read_image(path), self._spec)), label


def _area(boxes: torch.Tensor) -> torch.Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
