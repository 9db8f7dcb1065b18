"""A synthetic fine-grained data set: birds whose classes differ only in the shape of one mark on the wing.

    python tests/synthetic.py OUT --classes 4 --per-class 40 --size 96 --seed 0

Position, scale, rotation, flip, colours, background and blur come from one distribution for every class, and all marks
have the same area, so that only the mark tells the class. ``OUT/boxes.csv`` has the box of the whole bird (``object``)
and of every part, the telling one (``mark``) included, in pixels. The same arguments give the same files.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.uint8]
Points = npt.NDArray[np.float64]
Box = tuple[int, int, int, int]

TELLING_PART = "mark"
SPLITS = {"train": 0.6, "val": 0.2, "test": 0.2}
_SUPERSAMPLE = 2
_MARK_CENTRE = (-0.04, 0.0)
_MARK_AREA = 0.062
"""In units of the bird's length squared."""


def _polar(radius: Callable[[Points], Points], count: int = 48) -> Points:
    angle = np.linspace(0, 2 * math.pi, count, endpoint=False)
    return np.stack([radius(angle) * np.cos(angle), radius(angle) * np.sin(angle)], axis=1)


def _ellipse(centre: tuple[float, float], half: tuple[float, float]) -> Points:
    points: Points = _polar(np.ones_like) * half + np.array(centre)
    return points


# Outlines about the origin; `_mark` brings all of them to the same area.
MARKS: dict[str, list[Points]] = {
    "disc": [_ellipse((0, 0), (1, 1))],
    "bar": [_ellipse((0, 0), (1.9, 0.42))],
    "cross": [
        np.array([(-3, -1), (-1, -1), (-1, -3), (1, -3), (1, -1), (3, -1)], float),
        np.array([(-3, -1), (3, -1), (3, 1), (1, 1), (1, 3), (-1, 3), (-1, 1), (-3, 1)], float),
    ],
    "pair": [_ellipse((-1.15, 0), (0.75, 0.75)), _ellipse((1.15, 0), (0.75, 0.75))],
    "triangle": [np.array([(-1, -1), (-1, 1), (1, 0)], float)],
    "stripes": [_ellipse((0, -0.75), (1.4, 0.3)), _ellipse((0, 0.75), (1.4, 0.3))],
    "post": [_ellipse((0, 0), (0.4, 1.3))],
    "star": [_polar(lambda angle: 0.65 + 0.35 * np.cos(5 * angle))],
}

# The other parts of a bird of length 1 that looks to the right, y downwards; drawn in this order.
PARTS: dict[str, Points] = {
    "tail": np.array([(-0.30, -0.04), (-0.62, -0.12), (-0.60, 0.10), (-0.28, 0.08)]),
    "legs": np.array([(-0.02, 0.15), (0.02, 0.34), (0.12, 0.34), (0.05, 0.31), (0.06, 0.15)]),
    "body": _ellipse((0.0, 0.0), (0.38, 0.24)),
    "head": _ellipse((0.36, -0.17), (0.15, 0.14)),
    "beak": np.array([(0.47, -0.22), (0.64, -0.14), (0.47, -0.10)]),
    "eye": _ellipse((0.40, -0.20), (0.032, 0.032)),
    "wing": _ellipse((-0.05, 0.0), (0.29, 0.19)),
}


def _area(polygon: Points) -> float:
    x, y = polygon[:, 0], polygon[:, 1]
    return abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2


def _mark(kind: str) -> list[Points]:
    scale = math.sqrt(_MARK_AREA / 2 / sum(_area(polygon) for polygon in MARKS[kind]))
    return [polygon * scale + np.array(_MARK_CENTRE) for polygon in MARKS[kind]]


def _background(rng: np.random.Generator, side: int) -> Image:
    coarse = rng.uniform(60, 200, (5, 5, 3)) * rng.uniform(0.7, 1.1, 3)
    image = cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)
    image += cv2.resize(rng.normal(0, 14, (side // 4, side // 4, 1)), (side, side))[..., np.newaxis]
    background: Image = image.clip(0, 255).astype(np.uint8)
    return background


def _colours(rng: np.random.Generator) -> dict[str, tuple[float, ...]]:
    plumage = rng.uniform(30, 170, 3)
    wing = plumage * rng.uniform(0.45, 0.7)
    contrast = rng.uniform(70, 110)
    return {
        "tail": tuple(plumage * 0.7),
        "legs": (40.0, 110.0, 190.0),
        "body": tuple(plumage),
        "head": tuple(np.clip(plumage + rng.uniform(-30, 30, 3), 0, 255)),
        "beak": (30.0, 140.0, 220.0),
        "eye": (10.0, 10.0, 10.0),
        "wing": tuple(wing),
        TELLING_PART: tuple(np.clip(wing + contrast + rng.uniform(-15, 15, 3), 0, 255)),
    }


def draw(rng: np.random.Generator, kind: str, size: int, *, far: bool = False) -> tuple[Image, dict[str, Box]]:
    """Draw one bird with the mark ``kind``; a ``far`` one is half as long, and anywhere in the image.

    Returns:
        ``uint8 [size, size, 3]`` BGR, and for ``object`` and every part its box (x0, y0, x1, y1) in pixels, the ends
        exclusive.
    """
    side = size * _SUPERSAMPLE
    image = _background(rng, side)
    colours = _colours(rng)
    length = side * rng.uniform(0.62, 0.76) * (0.5 if far else 1.0)
    angle = math.radians(rng.uniform(-25, 25))
    flip = rng.choice([-1.0, 1.0])
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    shift = side / 2 + rng.uniform(-0.09, 0.09, 2) * side * (3.0 if far else 1.0)
    boxes: dict[str, Box] = {}
    for part, outlines in {**{name: [outline] for name, outline in PARTS.items()}, TELLING_PART: _mark(kind)}.items():
        placed = [(outline * (flip, 1.0)) @ turn.T * length + shift for outline in outlines]
        for outline in placed:
            cv2.fillPoly(image, [np.round(outline * 16).astype(np.int32)], colours[part], cv2.LINE_AA, shift=4)
        boxes[part] = _box(np.concatenate(placed) / _SUPERSAMPLE, size)
    edges = np.array(list(boxes.values()))
    boxes["object"] = (*edges[:, :2].min(axis=0).tolist(), *edges[:, 2:].max(axis=0).tolist())
    image = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
    noisy = image * rng.uniform(0.85, 1.15) + rng.normal(0, 3, image.shape)
    return noisy.clip(0, 255).astype(np.uint8), boxes


def _box(points: Points, size: int) -> Box:
    low = np.floor(points.min(axis=0)).clip(0, size).astype(int).tolist()
    high = np.ceil(points.max(axis=0) + 0.5).clip(0, size).astype(int).tolist()
    return low[0], low[1], high[0], high[1]


def write_dataset(
    out: Path, *, classes: int = 4, per_class: int = 40, size: int = 96, seed: int = 0, far: bool = False
) -> Path:
    """Write ``out/{train,val,test}/<class>/*`` (60, 20 and 20 % of ``per_class`` images) and ``out/boxes.csv``.

    Every fourth file is a PNG, the others are JPEGs. ``far`` is that of `draw`. Returns ``out``.
    """
    if not 2 <= classes <= len(MARKS):
        raise ValueError(f"there are between 2 and {len(MARKS)} classes; got {classes}")
    rows: list[tuple[str, str, int, int, int, int]] = []
    counts = {split: max(1, round(share * per_class)) for split, share in SPLITS.items()}
    for number, split in enumerate(SPLITS):
        for index, kind in enumerate(list(MARKS)[:classes]):
            folder = out / split / kind
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(counts[split]):
                image, boxes = draw(np.random.default_rng([seed, number, index, i]), kind, size, far=far)
                # OpenCV's own JPEG quality is 95.
                path = folder / f"{kind}_{i:04d}.{'png' if i % 4 == 3 else 'jpg'}"
                cv2.imwrite(str(path), image)
                rows += [(path.relative_to(out).as_posix(), part, *box) for part, box in boxes.items()]
    with (out / "boxes.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "part", "x0", "y0", "x1", "y1"])
        writer.writerows(rows)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a synthetic fine-grained data set.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--classes", type=int, default=4)
    parser.add_argument("--per-class", type=int, default=40)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_dataset(
        arguments.out,
        classes=arguments.classes,
        per_class=arguments.per_class,
        size=arguments.size,
        seed=arguments.seed,
    )


if __name__ == "__main__":
    main()
