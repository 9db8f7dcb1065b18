"""Maps and boxes land on the pixels that the network saw, and every PNG has a name of its own."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from edgefg.decision import ClassProbability
from edgefg.preprocess import InputSpec, crop_box, prepare, resize
from edgefg.training.explain import FrameAttention, attend, draw, file_names
from edgefg.training.methods import METHODS, build
from edgefg.training.models.backbone import build_backbone
from edgefg.training.models.network import Attention, Network

_LEVELS = (127.0, 127.0, 127.0)
_BEST = (ClassProbability("plum", 0, 0.75), ClassProbability("pear", 1, 0.25))


class Bright(torch.nn.Module):
    """Attends to what is bright: its map is the mean of 8×8 pixels, its box that of the pixels above half."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean(dim=(1, 2))[:, :2]

    def attention(self, images: torch.Tensor) -> Attention:
        grey = images.float().mean(dim=3)[:, None] / 255
        ys, xs = torch.nonzero(grey[0, 0] > 0.5, as_tuple=True)
        size = images.shape[1]
        box = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) / size
        missing = torch.full((4,), torch.nan)
        boxes = torch.stack([box, missing])[None]
        return Attention(torch.nn.functional.avg_pool2d(grey, 8), boxes, ("lamp", "shade"))


def lamp(height: int, width: int, box: tuple[int, int, int, int]) -> np.ndarray:
    """A dark frame with one bright box, x0, y0, x1, y1."""
    frame = np.full((height, width, 3), 10, np.uint8)
    frame[box[1] : box[3], box[0] : box[2]] = 255
    return frame


@pytest.mark.parametrize(
    ("height", "width", "spec"),
    [
        (64, 64, InputSpec(height=64, width=64, crop_fraction=0.5)),  # passes untouched, whatever the crop
        (300, 200, InputSpec(height=64, width=64)),
        (200, 300, InputSpec(height=64, width=64, crop_fraction=0.75)),
        (200, 300, InputSpec(height=64, width=32)),
        (211, 97, InputSpec(height=64, width=64, crop="none")),
    ],
)
def test_the_seen_box_is_what_the_network_gets(height: int, width: int, spec: InputSpec) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    top, left, rows, columns = crop_box(height, width, spec)
    part = resize(frame[top : top + rows, left : left + columns], spec.height, spec.width)
    assert np.array_equal(prepare(frame, spec), part[..., ::-1])


def test_boxes_and_maps_land_on_the_pixels() -> None:
    spec = InputSpec(height=64, width=64, crop_fraction=0.8)
    frame = lamp(400, 600, (340, 120, 380, 160))
    seen = attend(Bright(), frame, spec, 3)  # type: ignore[arg-type]
    assert list(seen.boxes) == ["lamp"]  # a part that is not found is left out
    assert seen.boxes["lamp"] == pytest.approx([340, 120, 380, 160], abs=6)
    drawn = draw(frame, seen, spec, _BEST)
    # Picture and map at the frame's own size, side by side; nothing else is red.
    heat = drawn[:, 608:].astype(int)
    ys, xs = np.nonzero(heat[..., 2] - heat[..., 0] > 100)
    title = (drawn.shape[0] - 400) // 3  # one line above, two below
    assert (xs.mean(), ys.mean() - title) == pytest.approx((360, 140), abs=6)
    # What the network does not see is darker: the crop is 320 pixels square.
    assert drawn[title + 5, 300].max() < drawn[title + 60, 300].max()


def test_a_small_picture_is_enlarged_and_a_long_one_bounded() -> None:
    seen = FrameAttention(np.zeros(2, np.float32), [("attention", np.zeros((2, 2), np.float32))], {})
    for (height, width), expected in {(32, 64): 448, (64, 32): 448, (2000, 3000): 1024, (3000, 30): 41}.items():
        drawn = draw(np.zeros((height, width, 3), np.uint8), seen, InputSpec(height=16, width=16), _BEST)
        assert drawn.shape[1] == 2 * expected + 8


@pytest.mark.parametrize("top", [1, 2, 9])
def test_the_mean_comes_first_and_then_the_strongest(top: int) -> None:
    maps = torch.zeros(1, 4, 2, 2)
    for i in range(4):
        maps[0, i, 0, 0] = i + 1

    class Many(Bright):
        def attention(self, images: torch.Tensor) -> Attention:
            return Attention(maps, None, strength=torch.tensor([[9.0, 0.1, 0.3, 0.2]]))

    seen = attend(Many(), lamp(8, 8, (0, 0, 4, 4)), InputSpec(height=8, width=8), top)  # type: ignore[arg-type]
    assert [name for name, _ in seen.maps] == ["mean of the maps", "map 2", "map 3", "map 1"][: 1 + top]
    assert [found[0, 0] for _, found in seen.maps] == [1, 3, 4, 2][: 1 + top]


# An untrained detector is sure of nothing: only a low threshold leaves boxes to draw.
_OPTIONS = {"partrcnn": {"parts": "object,head", "threshold": 1e-6, "width": 16, "proposals": 20}}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_drawn(method: str) -> None:
    torch.manual_seed(0)
    network: Network = build(method, build_backbone("resnet10t", 3), _LEVELS, _LEVELS, _OPTIONS.get(method, {})).eval()
    frame = np.random.default_rng(1).integers(0, 256, (70, 90, 3), np.uint8)
    spec = InputSpec(height=64, width=64)
    seen = attend(network, frame, spec, 2)
    assert seen.maps or seen.boxes
    drawn = draw(frame, seen, spec, _BEST)
    assert drawn.shape[1] == (1 + len(seen.maps)) * 456 - 8


def test_names_do_not_collide() -> None:
    files = [Path(name) for name in ("/a/x/1.jpg", "/a/y/1.jpg", "/b/y/1.jpg", "/b/y/1.JPG", "/b/y/1.png", "/y-1.jpg")]
    names = file_names(files)
    assert names[:3] == ["1.jpg.png", "y-1.jpg.png", "b-y-1.jpg.png"]
    assert len({name.lower() for name in names}) == len(files)


def test_names_of_any_script_are_drawn() -> None:
    seen = FrameAttention(np.zeros(2, np.float32), [], {"Flügel 翼": np.array([2, 2, 20, 20], np.float32)})
    drawn = draw(
        np.zeros((64, 64, 3), np.uint8), seen, InputSpec(height=16, width=16), (ClassProbability("学习", 0, 1.0),)
    )
    assert cv2.imencode(".png", drawn)[0]
    assert drawn[40:300].max() > 200
