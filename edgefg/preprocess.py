"""Frame → network input: the only crop, resize and colour conversion of the project.

Training, evaluation, calibration, golden sets, ``Classifier`` and the benchmark all use this module, so the uint8
inputs of a network are bit-identical from training to device.

* Crop first, then resize: dropped pixels are never touched.
* Upscaling is linear. Downscaling is antialiased: halve (2×2 area) while the ratio is 4 or more, blur with a Gaussian,
  then interpolate linearly. The Gaussian supplies the variance that Pillow's antialiased bilinear filter has in
  addition. ``docs/experiments/preprocessing.md`` has the measurement: a third of area averaging's error in a third of
  its time.
* For a frame that already has the network's size, only the colour order changes.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, cast

import msgspec
import numpy as np
import numpy.typing as npt

from edgefg.errors import FrameError

Color = Literal["bgr", "rgb", "bgra", "rgba", "gray"]
UInt8Array = npt.NDArray[np.uint8]

_CHANNELS = {"bgr": 3, "rgb": 3, "bgra": 4, "rgba": 4, "gray": 1}
_HALVE_FROM = 4.0
_NEGLIGIBLE_VARIANCE = 0.02


class InputSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Network input, ``uint8 [N, height, width, 3]``, and how a frame is converted to it."""

    height: Annotated[int, msgspec.Meta(ge=1, le=8192)]
    """Network input height in pixels."""
    width: Annotated[int, msgspec.Meta(ge=1, le=8192)]
    """Network input width in pixels."""
    color: Literal["rgb"] = "rgb"
    """Order of the three input channels."""
    resize: Literal["blur-linear"] = "blur-linear"
    """Resize rule, defined in the module's docstring."""
    crop: Literal["center", "none"] = "center"
    """``center``: the largest centred rectangle of the network's aspect ratio; ``none``: the whole frame, squeezed."""
    crop_fraction: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    """Fraction of the rectangle's sides that is kept (0.875 in many ImageNet evaluations)."""


def prepare(frame: UInt8Array, spec: InputSpec, *, color: Color = "bgr") -> UInt8Array:
    """Convert a frame to a network input.

    Args:
        frame: ``uint8 [H, W, 3]`` (``bgr``, ``rgb``), ``[H, W, 4]`` (``bgra``, ``rgba``; alpha is dropped) or
            ``[H, W]`` / ``[H, W, 1]`` (``gray``). Not modified.
        spec: the network input.
        color: the frame's channel order. Default: BGR, as in OpenCV.

    Returns:
        ``uint8 [spec.height, spec.width, 3]``, RGB, C-contiguous. It shares memory with ``frame`` only if ``frame`` is
        already RGB and has the network's size.

    Raises:
        FrameError: the array is not a frame of that colour order.
    """
    check_frame(frame, color)
    if frame.shape[:2] != (spec.height, spec.width):
        frame = resize(crop(frame, spec), spec.height, spec.width)
    return _to_rgb(frame, color)


def check_frame(frame: Any, color: Color = "bgr") -> None:
    """Raise `FrameError` unless ``frame`` is a uint8 image of at least 1×1 pixels in the stated colour order."""
    channels = _CHANNELS.get(color) if isinstance(color, str) else None
    if channels is None:
        raise FrameError(f"unknown colour order {color!r}; use one of {', '.join(_CHANNELS)}")
    if not isinstance(frame, np.ndarray):
        what = "None (did the camera or cv2.imread fail?)" if frame is None else f"a {type(frame).__name__}"
        raise FrameError(f"the frame is {what}; pass a NumPy uint8 array [H, W, {channels}] ({color})")
    shape_fits = (frame.ndim == 3 and frame.shape[2] == channels) or (frame.ndim == 2 and channels == 1)
    if frame.dtype != np.uint8 or not shape_fits or 0 in frame.shape:
        wanted = "uint8 [H, W]" if channels == 1 else f"uint8 [H, W, {channels}]"
        advice = "set color='gray', 'bgra', 'rgba' or 'rgb' if the camera delivers that"
        if frame.dtype != np.uint8:
            advice = "convert it to levels from 0 to 255 first"
        raise FrameError(
            f"the frame is {frame.dtype} {list(frame.shape)}; color={color!r} requires {wanted} of at least 1×1"
            f" pixels ({advice})"
        )


def crop(frame: UInt8Array, spec: InputSpec) -> UInt8Array:
    """Return the part of the frame that becomes the network input, as a view."""
    top, left, height, width = _center_crop(frame.shape[0], frame.shape[1], spec)
    return frame[top : top + height, left : left + width]


def crop_box(height: int, width: int, spec: InputSpec) -> tuple[int, int, int, int]:
    """Return the part of a frame that `prepare` uses: top, left, height and width in pixels of the frame."""
    if (height, width) == (spec.height, spec.width):
        return 0, 0, height, width
    return _center_crop(height, width, spec)


def _center_crop(height: int, width: int, spec: InputSpec) -> tuple[int, int, int, int]:
    if spec.crop == "none":
        return 0, 0, height, width
    scale = min(height / spec.height, width / spec.width) * spec.crop_fraction
    crop_height = min(height, max(1, round(spec.height * scale)))
    crop_width = min(width, max(1, round(spec.width * scale)))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def resize(image: UInt8Array, height: int, width: int) -> UInt8Array:
    """Resize ``uint8 [H, W(, C)]`` by the rule ``blur-linear`` of the module's docstring.

    Mean deviation from Pillow's antialiased bilinear filter: 0.2–0.5 levels on photographs.
    """
    import cv2

    if image.shape[:2] == (height, width):
        return image
    halvings_y = halvings_x = 0
    while True:
        halve_y = image.shape[0] >= _HALVE_FROM * height
        halve_x = image.shape[1] >= _HALVE_FROM * width
        if not (halve_y or halve_x):
            break
        # An even size keeps OpenCV on its exact 2×2 average; an odd last row or column is too small to matter.
        rows, columns = image.shape[0] // (1 + halve_y), image.shape[1] // (1 + halve_x)
        image = image[: rows * (1 + halve_y), : columns * (1 + halve_x)]
        image = cv2.resize(image, (columns, rows), interpolation=cv2.INTER_AREA)
        halvings_y, halvings_x = halvings_y + halve_y, halvings_x + halve_x
    variance_y = _missing_variance(image.shape[0] / height, halvings_y)
    variance_x = _missing_variance(image.shape[1] / width, halvings_x)
    if max(variance_y, variance_x) > _NEGLIGIBLE_VARIANCE:
        taps_x, sigma_x = _gaussian(variance_x)
        taps_y, sigma_y = _gaussian(variance_y)
        image = cv2.GaussianBlur(image, (taps_x, taps_y), sigmaX=sigma_x, sigmaY=sigma_y)
    return cast(UInt8Array, cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR))


def _missing_variance(ratio: float, halvings: int) -> float:
    """Return the variance, in squared pixels, that a blur must add before a linear resize by ``ratio``.

    Pillow's filter is a triangle of half-width ``ratio·2^halvings`` original pixels: variance ratio²·4^halvings/6. The
    halvings add that of a box of 2^halvings pixels, (4^halvings - 1)/12. Linear interpolation adds between 0 and 1/4
    (of the coarser grid), depending on position; 1/12 measured best.
    """
    if ratio <= 1.0:
        return 0.0
    return ratio * ratio / 6 - (1 - 4.0**-halvings) / 12 - 1 / 12


def _gaussian(variance: float) -> tuple[int, float]:
    """Return taps and sigma of a Gaussian kernel whose sampled weights have about this variance in squared pixels."""
    if variance <= _NEGLIGIBLE_VARIANCE:
        return 1, 1.0
    if variance > 0.5:
        return (5 if variance < 1.2 else 7), math.sqrt(variance)
    # Three taps [a, 1 - 2a, a] have variance 2a exactly; a = e/(1 + 2e) with e = exp(-1/(2σ²)).
    outer = variance / 2
    return 3, math.sqrt(-0.5 / math.log(outer / (1 - 2 * outer)))


def _to_rgb(image: UInt8Array, color: Color) -> UInt8Array:
    import cv2

    if color == "rgb":
        return np.ascontiguousarray(image)
    codes = {
        "bgr": cv2.COLOR_BGR2RGB,
        "bgra": cv2.COLOR_BGRA2RGB,
        "rgba": cv2.COLOR_RGBA2RGB,
        "gray": cv2.COLOR_GRAY2RGB,
    }
    return cast(UInt8Array, cv2.cvtColor(image, codes[color]))
