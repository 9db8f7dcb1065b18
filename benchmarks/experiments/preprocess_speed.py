"""Time and error of ways to bring a 1280×720 camera frame to 224 px; it chose the rule of `edgefg.preprocess`.

    python -m edgefg.benchmarks.experiments.preprocess_speed [FOLDER] [--frames mosaic|enlarged] [--images 40] [--size
    224]

The frames are made of photographs below FOLDER (default: ``test/`` of the grocery set, at ``$EDGEFG_GROCERY`` or
``../shared/data/grocery``): side by side at their own sharpness (``mosaic``), or one photograph enlarged
(``enlarged``, as smooth as a soft lens). Errors are against Pillow's antialiased bilinear filter on the same centre
square, in levels of 0 … 255. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from edgefg.benchmarks.device import load_average
from edgefg.benchmarks.report import json_line
from edgefg.benchmarks.stats import percentile
from edgefg.errors import DataError
from edgefg.evaluation.tables import table
from edgefg.evaluation.timing import alternate
from edgefg.image_io import image_files, read_image
from edgefg.preprocess import InputSpec, UInt8Array, crop, prepare, resize

HEIGHT, WIDTH = 720, 1280
Resizer = Callable[[UInt8Array, int], UInt8Array]


class ResizeMethod(msgspec.Struct, frozen=True, kw_only=True):
    """One way to resize, measured over all frames."""

    name: str
    p50_ms: float
    p90_ms: float
    mean_error: float
    """Mean absolute difference from Pillow, in levels."""
    error_p999: float
    """99.9th percentile of the absolute difference, in levels."""


class PreprocessSpeed(msgspec.Struct, frozen=True, kw_only=True):
    """All candidates on the same frames."""

    frames: str
    images: int
    size: int
    """Side of the result in pixels."""
    threads: int
    """Threads of OpenCV."""
    repeats: int
    load_before: float | None
    candidates: tuple[ResizeMethod, ...]


def area_then_crop(frame: UInt8Array, size: int) -> UInt8Array:
    """Area averaging of the whole frame, then the centre."""
    import cv2

    width = round(frame.shape[1] * size / frame.shape[0])
    whole = cv2.resize(frame, (width, size), interpolation=cv2.INTER_AREA)
    left = (width - size) // 2
    return np.ascontiguousarray(whole[:, left : left + size])


def crop_area(frame: UInt8Array, size: int) -> UInt8Array:
    """Area averaging of the centre."""
    import cv2

    return np.asarray(cv2.resize(_centre(frame), (size, size), interpolation=cv2.INTER_AREA), np.uint8)


def crop_bin_linear(frame: UInt8Array, size: int) -> UInt8Array:
    """Binning of the centre by the whole part of the ratio, then linear."""
    import cv2

    image = _centre(frame)
    factor = image.shape[0] // size
    if factor > 1:
        side = image.shape[0] // factor
        image = cv2.resize(image[: side * factor, : side * factor], (side, side), interpolation=cv2.INTER_AREA)
    return _linear(image, size)


def crop_halve_linear(frame: UInt8Array, size: int) -> UInt8Array:
    """Halving of the centre while it is twice too large or more, then linear."""
    import cv2

    image = _centre(frame)
    while image.shape[0] >= 2 * size:
        side = image.shape[0] // 2
        image = cv2.resize(image[: 2 * side, : 2 * side], (side, side), interpolation=cv2.INTER_AREA)
    return _linear(image, size)


def crop_linear(frame: UInt8Array, size: int) -> UInt8Array:
    """Linear interpolation of the centre; it aliases."""
    return _linear(_centre(frame), size)


def ours(frame: UInt8Array, size: int) -> UInt8Array:
    """`edgefg.preprocess`: crop and resize, without the change of the colour order."""
    return resize(_centre(frame), size, size)


def ours_complete(frame: UInt8Array, size: int) -> UInt8Array:
    """`edgefg.preprocess.prepare`: crop, resize and colour order, checks included; it gives RGB."""
    return prepare(frame, InputSpec(height=size, width=size), color="bgr")


def pillow(frame: UInt8Array, size: int) -> UInt8Array:
    """Pillow's antialiased bilinear filter on the centre: what the errors are measured against."""
    from PIL import Image  # a peer, as torchvision brings it; the core does without

    image = Image.fromarray(np.ascontiguousarray(_centre(frame)))
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))


CANDIDATES: dict[str, Resizer] = {
    "whole frame by area, then crop": area_then_crop,
    "crop, area": crop_area,
    "crop, integer bin, linear": crop_bin_linear,
    "crop, halve, linear": crop_halve_linear,
    "crop, linear": crop_linear,
    "edgefg.preprocess (crop, resize)": ours,
    "edgefg.preprocess.prepare (all of it)": ours_complete,
    "Pillow bilinear, antialiased": pillow,
}


def measure_speed(
    frames: list[UInt8Array], kind: str, *, size: int = 224, threads: int = 2, repeats: int = 5
) -> PreprocessSpeed:
    """Run every candidate on every frame, in turns.

    Args:
        frames: ``uint8 [720, 1280, 3]`` each.
        kind: how they were made, for the report.
        size: side of the result in pixels.
        threads: threads of OpenCV.
        repeats: timed runs of each candidate on each frame, after one that is not.
    """
    import cv2

    load_before, before = load_average(), cv2.getNumThreads()
    times: dict[str, list[float]] = {name: [] for name in CANDIDATES}
    errors: dict[str, list[np.ndarray[tuple[int, ...], np.dtype[np.int16]]]] = {name: [] for name in CANDIDATES}
    cv2.setNumThreads(threads)
    try:
        for frame in frames:
            wanted = pillow(frame, size).astype(np.int16)
            calls = [_call(resizer, frame, size) for resizer in CANDIDATES.values()]
            seconds = alternate(calls, turns=repeats)
            for (name, resizer), series in zip(CANDIDATES.items(), 1e3 * seconds, strict=True):
                times[name] += series.tolist()
                result = resizer(frame, size)
                if resizer is ours_complete:
                    result = result[:, :, ::-1]
                errors[name].append(np.abs(result.astype(np.int16) - wanted).ravel())
    finally:
        cv2.setNumThreads(before)
    candidates = tuple(_candidate(name, times[name], np.concatenate(errors[name])) for name in CANDIDATES)
    return PreprocessSpeed(
        frames=kind,
        images=len(frames),
        size=size,
        threads=threads,
        repeats=repeats,
        load_before=load_before,
        candidates=candidates,
    )


def make_frames(folder: Path, kind: str, count: int) -> list[UInt8Array]:
    """Make ``count`` frames, ``uint8 [720, 1280, 3]``, of photographs from all over a folder; see the module's text."""
    import cv2

    files = image_files(folder)
    step = max(1, len(files) // count)
    if kind == "enlarged":
        spec = InputSpec(height=HEIGHT, width=WIDTH)
        photographs = [crop(read_image(file), spec) for file in files[::step][:count]]
        return [cv2.resize(p, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC) for p in photographs]
    return [_mosaic(files, i * step) for i in range(min(count, len(files)))]


def default_folder() -> Path:
    """Return the grocery set's test split."""
    return Path(os.environ.get("EDGEFG_GROCERY", "../shared/data/grocery")) / "test"


def _mosaic(files: list[Path], first: int) -> UInt8Array:
    """Lay photographs side by side, in rows, until a frame is full."""
    frame = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    top = left = row_height = 0
    for offset in range(len(files) * HEIGHT * WIDTH):
        image = read_image(files[(first + offset) % len(files)])
        part = image[: HEIGHT - top, : WIDTH - left]
        frame[top : top + part.shape[0], left : left + part.shape[1]] = part
        left, row_height = left + image.shape[1], max(row_height, image.shape[0])
        if left >= WIDTH:
            top, left, row_height = top + row_height, 0, 0
        if top >= HEIGHT:
            break
    return frame


def _centre(frame: UInt8Array) -> UInt8Array:
    return crop(frame, InputSpec(height=1, width=1))


def _linear(image: UInt8Array, size: int) -> UInt8Array:
    import cv2

    return np.asarray(cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR), np.uint8)


def _call(resizer: Resizer, frame: UInt8Array, size: int) -> Callable[[], UInt8Array]:
    return lambda: resizer(frame, size)


def _candidate(name: str, times: list[float], errors: np.ndarray[tuple[int, ...], np.dtype[np.int16]]) -> ResizeMethod:
    return ResizeMethod(
        name=name,
        p50_ms=percentile(times, 50),
        p90_ms=percentile(times, 90),
        mean_error=float(errors.mean()),
        error_p999=float(np.percentile(errors, 99.9)),
    )


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m edgefg.benchmarks.experiments.preprocess_speed")
    parser.add_argument("folder", type=Path, nargs="?", default=default_folder(), help="folder of photographs")
    parser.add_argument("--frames", choices=("mosaic", "enlarged"), default="mosaic")
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=2, help="threads of OpenCV")
    arguments = parser.parse_args()
    try:
        frames = make_frames(arguments.folder, arguments.frames, arguments.images)
    except DataError as exc:
        parser.error(str(exc))
    result = measure_speed(frames, arguments.frames, size=arguments.size, threads=arguments.threads)
    rows = [
        {
            f"{WIDTH}×{HEIGHT} → {result.size}, {result.images} {result.frames} frames": candidate.name,
            "p50 ms": f"{candidate.p50_ms:.2f}",
            "p90 ms": f"{candidate.p90_ms:.2f}",
            "mean error": f"{candidate.mean_error:.2f}",
            "99.9 %": f"{candidate.error_p999:.0f}",
        }
        for candidate in result.candidates
    ]
    print(table(rows))
    print(json_line(result))


if __name__ == "__main__":
    main()
