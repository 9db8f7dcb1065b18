"""The one preprocessing: properties over all sizes, error against Pillow, and what is no frame."""

from __future__ import annotations

from typing import Any, get_args

import cv2
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edgefg.errors import EdgefgError, FrameError
from edgefg.preprocess import Color, InputSpec, UInt8Array, check_frame, crop, prepare, resize

COLORS: tuple[Color, ...] = get_args(Color)
CHANNELS = {"bgr": 3, "rgb": 3, "bgra": 4, "rgba": 4, "gray": 1}
sides = st.integers(1, 700)
targets = st.integers(1, 260)
crops = st.sampled_from(["center", "none"])
fractions = st.sampled_from([1.0, 0.875, 0.3])
quick = settings(deadline=None, max_examples=60)


def _noise(height: int, width: int, channels: int, seed: int = 0) -> UInt8Array:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def _spec(height: int, width: int, rule: Any = "center", fraction: float = 1.0) -> InputSpec:
    return InputSpec(height=height, width=width, crop=rule, crop_fraction=fraction)


@quick
@given(sides, sides, targets, targets, st.sampled_from(COLORS), crops, fractions)
def test_any_frame_becomes_a_network_input(
    height: int, width: int, to_height: int, to_width: int, color: Color, rule: str, fraction: float
) -> None:
    frame = _noise(height, width, CHANNELS[color])
    before = frame.copy()
    found = prepare(frame, _spec(to_height, to_width, rule, fraction), color=color)
    assert found.shape == (to_height, to_width, 3)
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(frame, before)


@quick
@given(sides, sides, targets, targets, crops, st.tuples(*[st.integers(0, 255)] * 3))
def test_a_constant_frame_stays_constant(
    height: int, width: int, to_height: int, to_width: int, rule: str, colour: tuple[int, int, int]
) -> None:
    frame = np.full((height, width, 3), colour, np.uint8)
    found = prepare(frame, _spec(to_height, to_width, rule))
    assert (found == colour[::-1]).all()


@quick
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from(COLORS), crops)
def test_a_frame_of_network_size_passes_untouched(height: int, width: int, color: Color, rule: str) -> None:
    frame = _noise(height, width, CHANNELS[color])
    found = prepare(frame, _spec(height, width, rule, 0.5), color=color)
    order = {"bgr": [2, 1, 0], "bgra": [2, 1, 0], "rgb": [0, 1, 2], "rgba": [0, 1, 2], "gray": [0, 0, 0]}[color]
    np.testing.assert_array_equal(found, frame[..., order])


@quick
@given(sides, sides, targets, targets, fractions)
def test_the_crop_is_the_largest_centred_rectangle(
    height: int, width: int, to_height: int, to_width: int, fraction: float
) -> None:
    # Each pixel holds its own place, so that the view tells where it was cut.
    frame = np.dstack([*np.divmod(np.arange(height * width).reshape(height, width), width), np.zeros((height, width))])
    part = crop(frame.astype(np.uint16), _spec(to_height, to_width, "center", fraction))
    top, left = part[0, 0, 0], part[0, 0, 1]
    below, right = height - 1 - part[-1, -1, 0], width - 1 - part[-1, -1, 1]
    assert abs(int(top) - int(below)) <= 1
    assert abs(int(left) - int(right)) <= 1
    scale = min(height / to_height, width / to_width) * fraction
    assert abs(part.shape[0] - max(1, to_height * scale)) <= 0.5 + 1e-9
    assert abs(part.shape[1] - max(1, to_width * scale)) <= 0.5 + 1e-9


@quick
@given(sides, sides, targets, targets)
def test_grey_equals_bgr_of_equal_channels(height: int, width: int, to_height: int, to_width: int) -> None:
    grey = _noise(height, width, 1)
    spec = _spec(to_height, to_width)
    expected = prepare(np.repeat(grey, 3, axis=2), spec)
    np.testing.assert_array_equal(prepare(grey, spec, color="gray"), expected)
    np.testing.assert_array_equal(prepare(grey[..., 0], spec, color="gray"), expected)


@pytest.mark.parametrize("color", COLORS)
def test_colour_orders_agree(color: Color) -> None:
    rgb = _noise(97, 131, 3)
    alpha = _noise(97, 131, 1, seed=1)
    frames = {
        "rgb": rgb,
        "bgr": rgb[..., ::-1],
        "rgba": np.dstack([rgb, alpha]),
        "bgra": np.dstack([rgb[..., ::-1], alpha]),
        "gray": rgb[..., :1],
    }
    spec = _spec(40, 30)
    expected = prepare(rgb if color != "gray" else np.repeat(rgb[..., :1], 3, axis=2), spec, color="rgb")
    np.testing.assert_array_equal(prepare(frames[color], spec, color=color), expected)


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("size", [(40, 30), (97, 131)])
def test_views_of_any_strides_are_frames(color: Color, size: tuple[int, int]) -> None:
    whole = _noise(194, 262, CHANNELS[color])
    view = whole[::-2, ::2]
    spec = _spec(*size)
    np.testing.assert_array_equal(prepare(view, spec, color=color), prepare(view.copy(), spec, color=color))
    view.flags.writeable = False
    prepare(view, spec, color=color)


def _photograph(height: int, width: int) -> UInt8Array:
    """Smooth shapes, an edge and sensor noise: what a photograph has, from a fixed seed."""
    rng = np.random.default_rng(3)
    smooth = cv2.resize(
        rng.uniform(30, 220, (height // 24, width // 24, 3)), (width, height), interpolation=cv2.INTER_CUBIC
    )
    smooth[:, width // 2 :] *= 0.7
    cv2.circle(smooth, (width // 3, height // 2), height // 4, (220.0, 90.0, 40.0), -1, cv2.LINE_AA)
    noisy: UInt8Array = (smooth + rng.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)
    return noisy


@pytest.mark.parametrize(
    ("size", "target", "rule"),
    [
        ((720, 1280), (224, 224), "center"),
        ((720, 1280), (224, 224), "none"),
        ((480, 640), (224, 224), "center"),
        ((348, 348), (192, 192), "center"),
        ((300, 300), (224, 224), "center"),
        ((600, 400), (96, 192), "center"),
        ((500, 333), (64, 200), "none"),
        ((1080, 1920), (64, 64), "center"),
        ((100, 120), (224, 192), "center"),
    ],
)
def test_error_against_pillow_is_small(size: tuple[int, int], target: tuple[int, int], rule: str) -> None:
    frame = _photograph(*size)
    spec = _spec(*target, rule)
    cut = np.ascontiguousarray(crop(frame, spec))
    pillow = np.asarray(Image.fromarray(cut).resize(target[::-1], Image.Resampling.BILINEAR))
    error = np.abs(prepare(frame, spec, color="rgb").astype(int) - pillow)
    assert error.mean() <= 1.0
    assert np.percentile(error, 99.9) <= 12


def test_shrinking_does_not_alias() -> None:
    """A fine checkerboard shrinks to even grey; linear interpolation alone would keep stripes."""
    board = (np.indices((512, 512)).sum(axis=0) % 2 * 255).astype(np.uint8)
    for side in (60, 100, 128, 200, 224, 256):
        found = resize(np.dstack([board] * 3), side, side)[4:-4, 4:-4]
        assert found.std() < 12, side
        assert abs(found.mean() - 127.5) < 2, side


@pytest.mark.parametrize(
    ("frame", "color", "found", "wanted"),
    [
        (None, "bgr", "None", "[H, W, 3]"),
        ([[1, 2, 3]], "bgr", "a list", "[H, W, 3]"),
        ("photo.jpg", "bgr", "a str", "[H, W, 3]"),
        (np.zeros((4, 4, 3), np.float32), "bgr", "float32 [4, 4, 3]", "uint8 [H, W, 3]"),
        (np.zeros((4, 4, 3), np.int8), "bgr", "int8 [4, 4, 3]", "uint8 [H, W, 3]"),
        (np.zeros((4, 4, 3), bool), "bgr", "bool [4, 4, 3]", "uint8 [H, W, 3]"),
        (np.zeros((4, 4, 3), np.uint16), "rgb", "uint16 [4, 4, 3]", "uint8 [H, W, 3]"),
        (np.zeros((4, 4), np.uint8), "bgr", "uint8 [4, 4]", "uint8 [H, W, 3]"),
        (np.zeros((4, 4, 1), np.uint8), "bgr", "uint8 [4, 4, 1]", "uint8 [H, W, 3]"),
        (np.zeros((4, 4, 4), np.uint8), "bgr", "uint8 [4, 4, 4]", "uint8 [H, W, 3]"),
        (np.zeros((4, 4, 3), np.uint8), "bgra", "uint8 [4, 4, 3]", "uint8 [H, W, 4]"),
        (np.zeros((4, 4, 3), np.uint8), "gray", "uint8 [4, 4, 3]", "uint8 [H, W]"),
        (np.zeros((1, 4, 4, 3), np.uint8), "bgr", "uint8 [1, 4, 4, 3]", "uint8 [H, W, 3]"),
        (np.zeros((3, 4, 4), np.uint8), "bgr", "uint8 [3, 4, 4]", "uint8 [H, W, 3]"),
        (np.zeros((0, 4, 3), np.uint8), "bgr", "uint8 [0, 4, 3]", "at least 1×1 pixel"),
        (np.zeros((4, 0), np.uint8), "gray", "uint8 [4, 0]", "at least 1×1 pixel"),
        (np.zeros((), np.uint8), "gray", "uint8 []", "uint8 [H, W]"),
        (np.zeros((4, 4, 3), np.uint8), "BGR", "'BGR'", "bgr, rgb, bgra, rgba, gray"),
        (np.zeros((4, 4, 3), np.uint8), None, "None", "bgr, rgb, bgra, rgba, gray"),
        (np.zeros((4, 4, 3), np.uint8), ["bgr"], "['bgr']", "bgr, rgb, bgra, rgba, gray"),
    ],
)
def test_what_is_no_frame_is_named_and_so_is_what_is_wanted(frame: Any, color: Any, found: str, wanted: str) -> None:
    for attempt in (lambda: check_frame(frame, color), lambda: prepare(frame, _spec(4, 4), color=color)):
        with pytest.raises(FrameError) as caught:
            attempt()
        assert found in str(caught.value)
        assert wanted in str(caught.value)
        assert "\n" not in str(caught.value)
        assert isinstance(caught.value, EdgefgError)
        assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "field",
    [
        {"height": 0},
        {"width": -1},
        {"crop": "left"},
        {"resize": "area"},
        {"crop_fraction": 0},
        {"color": "bgr"},
        {"x": 1},
    ],
)
def test_input_spec_is_closed(field: dict[str, object]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"height": 4, "width": 4} | field, InputSpec)
