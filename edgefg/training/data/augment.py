"""Images as tensors: torchvision's augmentation for training, the project's one preprocessing for evaluation.

The random crop of training is resized by `edgefg.preprocess.resize` too, because a resize filter that differs between
training and device flips fine-grained labels by itself. Boxes of parts go through the same geometry as the pixels.
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

# Image → boxes of its parts, ``float32 [P, 4]``: x0, y0, x1, y1 in pixels of the file as decoded; NaN where absent.
Boxes = Mapping[Path, npt.NDArray[np.float32]]
Item = tuple[torch.Tensor, int, torch.Tensor | None, int]

MIN_VISIBLE = 0.5
"""A part of which less than this share of the area is left in the picture counts as absent."""
_GREY = 127


class RandomResizedCrop(v2.RandomResizedCrop):  # type: ignore[misc]
    """torchvision's random crop, resized by the project's own filter; takes and gives ``uint8 [3, H, W]`` and boxes."""

    def transform(self, inpt: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
        """Cut out and resize one image, or move its boxes alike."""
        if isinstance(inpt, tv_tensors.BoundingBoxes):
            moved: torch.Tensor = super().transform(inpt, params)
            return moved
        top, left = params["top"], params["left"]
        part = inpt[:, top : top + params["height"], left : left + params["width"]].permute(1, 2, 0).numpy()
        return torch.from_numpy(np.ascontiguousarray(resize(part, *self.size))).permute(2, 0, 1)


class DropHidden(v2.Transform):  # type: ignore[misc]
    """Clamp boxes to the picture; those of which less than `MIN_VISIBLE` of the area is left become NaN."""

    _transformed_types = (tv_tensors.BoundingBoxes,)

    def transform(self, inpt: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
        """Clamp the boxes, ``float32 [P, 4]``, of one image."""
        height, width = inpt.canvas_size  # type: ignore[attr-defined]
        boxes = inpt.as_subclass(torch.Tensor)
        limit = boxes.new_tensor([width, height, width, height])
        inside = boxes.clamp(min=torch.zeros_like(limit), max=limit)
        # A NaN compares false and stays.
        inside[_area(inside) < MIN_VISIBLE * _area(boxes)] = torch.nan
        wrapped: torch.Tensor = tv_tensors.wrap(inside, like=inpt)
        return wrapped


class ColourRandAugment(v2.RandAugment):  # type: ignore[misc]
    """RandAugment without its shears, shifts and rotations, which would leave boxes of parts behind."""

    _AUGMENTATION_SPACE = {  # noqa: RUF012 (torchvision's own attribute)
        name: operation
        for name, operation in v2.RandAugment._AUGMENTATION_SPACE.items()
        if not name.startswith(("Shear", "Translate", "Rotate"))
    }


def geometric_transform(spec: InputSpec, augmentation: Augmentation) -> v2.Compose:
    """Build what moves pixels: crop and, where the settings ask for them, flips and rotation with grey corners.

    It takes ``uint8 [3, H, W]``, alone or with its `tv_tensors.BoundingBoxes` of ``clamping_mode=None``.
    """
    steps: list[v2.Transform] = [
        RandomResizedCrop((spec.height, spec.width), scale=(augmentation.min_area, 1.0), ratio=(3 / 4, 4 / 3)),
        # Here and again after a rotation, which must not turn a part that was cut off back into the picture.
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
    """Build what follows on ``uint8 [3, H, W]``: RandAugment where the settings ask for it, then colour jitter.

    An image with boxes (``boxed``) gets those operations of RandAugment only that move nothing.
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
    """Augmented ``uint8 [H, W, 3]`` RGB images with their labels, part boxes (where there are any) and positions.

    Args:
        samples: the images.
        spec: the network input's size.
        augmentation: geometry and colour; None takes the defaults. Mixing is the objective's.
        boxes: of the parts; an item then has them as ``float32 [P, 4]`` in pixels of its image, NaN where absent.
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
        """Decode and augment one image."""
        path, label = self.samples[index]
        image = torch.from_numpy(cv2.cvtColor(read_image(path), cv2.COLOR_BGR2RGB)).permute(2, 0, 1)
        boxes = None
        if self._boxes is None:
            image = self._move(image)
        else:
            image, moved = self._move(image, self._boxes_of(path, image))
            boxes = moved.as_subclass(torch.Tensor)
        # Colour works by planes, a third faster where each of them lies together.
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
    """``uint8 [H, W, 3]`` RGB images exactly as `edgefg.Classifier` prepares them, with their labels."""

    def __init__(self, samples: Sequence[Sample], spec: InputSpec) -> None:
        self._samples = samples
        self._spec = spec

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Decode and prepare one image."""
        path, label = self._samples[index]
        return torch.from_numpy(prepare(read_image(path), self._spec)), label


def _area(boxes: torch.Tensor) -> torch.Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
