from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import tv_tensors
from torchvision.transforms import v2

from edgefg.data.split import Sample
from edgefg.preprocess import InputSpec
from edgefg.settings.training import Augmentation
from edgefg.training.data.augment import (
    ColourRandAugment,
    DropHidden,
    RandomResizedCrop,
    TrainingImages,
    colour_transform,
    geometric_transform,
)
from edgefg.training.data.loader import collate

_SIDE = 64
_RED = (40, 40, 255)


def _augmentation(**fields: Any) -> Augmentation:
    return Augmentation(**{"min_area": 0.5} | fields)


def _picture(folder: Path, box: tuple[int, int, int, int], size: tuple[int, int] = (140, 110)) -> Path:
    """A grey picture, width × height, with a red rectangle."""
    frame = np.full((size[1], size[0], 3), 128, np.uint8)
    frame[box[1] : box[3], box[0] : box[2]] = _RED
    path = folder / f"{'_'.join(map(str, box))}.png"
    cv2.imwrite(str(path), frame)
    return path


def _red_box(image: torch.Tensor) -> np.ndarray:
    """Where the picture is red: x0, y0, x1, y1."""
    levels = image.numpy().astype(int)
    ys, xs = np.nonzero(levels[..., 0] - levels[..., 1] > 60)
    return np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], float)


@settings(max_examples=15, deadline=None)
@given(
    x=st.integers(30, 70),
    y=st.integers(25, 55),
    width=st.integers(14, 40),
    height=st.integers(14, 40),
    seed=st.integers(0, 2**31),
)
def test_boxes_follow_the_pixels_through_crop_and_flip(
    tmp_path_factory: pytest.TempPathFactory, x: int, y: int, width: int, height: int, seed: int
) -> None:
    box = (x, y, x + width, y + height)
    path = _picture(tmp_path_factory.mktemp("p"), box)
    augmentation, spec = _augmentation(), InputSpec(height=_SIDE, width=_SIDE)
    images = TrainingImages([Sample(path, 0)], spec, augmentation, {path: np.array([box], np.float32)})
    torch.manual_seed(seed)
    image, _, boxes, _ = images[0]
    assert boxes is not None
    if not boxes.isnan().any():
        np.testing.assert_allclose(boxes[0].numpy(), _red_box(image), atol=1.6)


@pytest.mark.parametrize(
    ("flip", "orders"),
    [("none", {(0, 1, 2, 3)}), ("horizontal", {(0, 1, 2, 3), (1, 0, 3, 2)}), ("both", None)],
)
def test_pictures_are_mirrored_as_the_settings_say_and_boxes_with_them(
    tmp_path: Path, flip: str, orders: set[tuple[int, ...]] | None
) -> None:
    box = (10, 10, 70, 40)  # red, in the upper left quarter
    path = _picture(tmp_path, box)
    quarters = np.array([[0, 0, 70, 55], [70, 0, 140, 55], [0, 55, 70, 110], [70, 55, 140, 110]], np.float32)
    images = TrainingImages(
        [Sample(path, 0)],
        InputSpec(height=_SIDE, width=_SIDE),
        _augmentation(flip=flip, min_area=1.0, color=0.0),
        {path: np.vstack([quarters, [box]]).astype(np.float32)},
    )
    torch.manual_seed(0)
    seen = set()
    for _ in range(40):
        image, _, boxes, _ = images[0]
        assert boxes is not None
        np.testing.assert_allclose(boxes[4].numpy(), _red_box(image), atol=1.6)
        right, lower = (boxes[:4, :2] > _SIDE / 4).T.int()
        seen.add(tuple((2 * lower + right).tolist()))
    every = {(0, 1, 2, 3), (1, 0, 3, 2), (2, 3, 0, 1), (3, 2, 1, 0)}
    assert seen == (orders or every)


def test_hue_turns_the_colours_and_leaves_grey(tmp_path: Path) -> None:
    path = _picture(tmp_path, (20, 20, 60, 60))
    images = TrainingImages(
        [Sample(path, 0)],
        InputSpec(height=_SIDE, width=_SIDE),
        _augmentation(hue=0.5, color=0.0, flip="none", min_area=1.0),
    )
    torch.manual_seed(0)
    pictures = torch.stack([images[0][0] for _ in range(12)]).int()
    assert (pictures[:, -1, -1] - 128).abs().max() <= 1
    greatest = pictures[:, 20, 16].argmax(dim=1)
    assert set(greatest.tolist()) == {0, 1, 2}


def test_the_defaults_draw_what_they_always_drew(tmp_path: Path) -> None:
    """An unfinished run must go on as it began: the same numbers are drawn, in the same order."""
    image = torch.arange(3 * 90 * 70, dtype=torch.uint8).view(3, 90, 70)
    spec = InputSpec(height=_SIDE, width=_SIDE)
    began = v2.Compose(
        [
            RandomResizedCrop((_SIDE, _SIDE), scale=(0.5, 1.0), ratio=(3 / 4, 4 / 3)),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(brightness=0.25, contrast=0.25, saturation=0.25),
        ]
    )
    now = v2.Compose([geometric_transform(spec, _augmentation()), colour_transform(_augmentation(), boxed=False)])
    for seed in range(6):
        torch.manual_seed(seed)
        expected = began(image)
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        assert torch.equal(now(image), expected)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("seed", range(8))
def test_boxes_hold_the_pixels_after_a_rotation(tmp_path: Path, seed: int) -> None:
    box = (50, 40, 90, 70)
    path = _picture(tmp_path, box)
    images = TrainingImages(
        [Sample(path, 0)],
        InputSpec(height=_SIDE, width=_SIDE),
        _augmentation(rotation=30.0, min_area=1.0, color=0.0),
        {path: np.array([box], np.float32)},
    )
    torch.manual_seed(seed)
    image, _, boxes, _ = images[0]
    assert boxes is not None
    np.testing.assert_allclose(boxes[0].numpy(), _red_box(image), atol=2.0)


def test_absent_and_unlisted_parts_are_nan(tmp_path: Path) -> None:
    listed, unlisted = _picture(tmp_path, (20, 20, 60, 60)), _picture(tmp_path, (10, 10, 30, 30))
    nan = float("nan")
    boxes = {listed: np.array([[20, 20, 60, 60], [nan] * 4], np.float32)}
    samples = [Sample(listed, 0), Sample(unlisted, 1)]
    images = TrainingImages(
        samples, InputSpec(height=_SIDE, width=_SIDE), _augmentation(min_area=1.0, rotation=9.0), boxes
    )
    batch = collate([images[0], images[1]])
    assert batch.boxes is not None
    assert batch.boxes.shape == (2, 2, 4)
    assert batch.boxes.dtype == torch.float32
    assert type(batch.boxes) is torch.Tensor
    assert batch.boxes.isnan().all(dim=2).tolist() == [[False, True], [True, True]]


def test_a_part_that_is_mostly_out_is_absent_and_the_others_are_clamped() -> None:
    boxes = torch.tensor([[-6.0, 0, 4, 10], [-4, 0, 6, 10], [2, 3, 5, 6], [30, 30, 40, 40]])
    given_boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(20, 20), clamping_mode=None)
    kept = DropHidden()(given_boxes).as_subclass(torch.Tensor)
    assert kept.isnan().all(dim=1).tolist() == [True, False, False, True]
    assert kept[1:3].tolist() == [[0, 0, 6, 10], [2, 3, 5, 6]]


def test_without_boxes_none_come_out(tmp_path: Path) -> None:
    path = _picture(tmp_path, (20, 20, 60, 60))
    image, label, boxes, index = TrainingImages([Sample(path, 3)], InputSpec(height=40, width=48), _augmentation())[0]
    assert (image.shape, image.dtype, label, boxes, index) == ((40, 48, 3), torch.uint8, 3, None, 0)
    assert image.is_contiguous()


def test_colour_jitter_and_randaugment_follow_the_augmentation() -> None:
    kinds = [type(step) for step in colour_transform(_augmentation(randaugment=9), boxed=False).transforms]
    assert kinds == [v2.RandAugment, v2.ColorJitter]
    kinds = [type(step) for step in colour_transform(_augmentation(randaugment=9), boxed=True).transforms]
    assert kinds == [ColourRandAugment, v2.ColorJitter]
    image = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    assert torch.equal(colour_transform(_augmentation(color=0.0), boxed=False)(image), image)


@pytest.mark.parametrize("seed", range(20))
def test_randaugment_moves_nothing_where_there_are_boxes(seed: int) -> None:
    image = torch.full((3, 32, 32), 90, dtype=torch.uint8)
    image[:, 8:20, 12:28] = torch.tensor([200, 60, 60], dtype=torch.uint8)[:, None, None]
    torch.manual_seed(seed)
    changed = ColourRandAugment(2, 9, fill=127)(image).int()
    # Whatever the colours became, each of the two areas (off the edge, for sharpness) is still of one colour.
    inside, outside = changed[:, 10:18, 14:26], changed[:, :, 30:]
    assert (inside == inside[:, :1, :1]).all()
    assert (outside == outside[:, :1, :1]).all()


def test_randaugment_changes_the_picture(tmp_path: Path) -> None:
    path = _picture(tmp_path, (20, 20, 60, 60))
    spec = InputSpec(height=_SIDE, width=_SIDE)
    seen = []
    for magnitude in (0, 15):
        images = TrainingImages([Sample(path, 0)], spec, _augmentation(randaugment=magnitude, color=0.0, min_area=1.0))
        torch.manual_seed(1)
        seen.append(torch.stack([images[0][0] for _ in range(4)]).float())
    assert (seen[0] - seen[1]).abs().mean() > 1


def test_the_crop_keeps_at_least_min_area(tmp_path: Path) -> None:
    frame = np.zeros((100, 100, 3), np.uint8)
    frame[..., 2] = np.arange(100)  # the level of red tells the column
    path = tmp_path / "ramp.png"
    cv2.imwrite(str(path), frame)
    images = TrainingImages([Sample(path, 0)], InputSpec(height=50, width=50), _augmentation(min_area=0.9, color=0.0))
    torch.manual_seed(0)
    for _ in range(20):
        reds = images[0][0][..., 0].int()
        assert int(reds.max() - reds.min()) >= 0.9 * 100 - 4
