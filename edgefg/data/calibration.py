"""Calibration images, from the training split, through the project's one preprocessing.

As many of each class and, where the data say under what an image was taken, as many of each condition within it: a
network that is calibrated by daylight alone clips what it sees by night.
"""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
from tqdm import tqdm

from edgefg.data.split import Sample
from edgefg.errors import DataError
from edgefg.image_io import read_image
from edgefg.preprocess import InputSpec, UInt8Array, prepare

_SYNTHETIC_FRAMES = 8


class Calibration(msgspec.Struct, frozen=True, eq=False):
    """What calibrates a network."""

    inputs: UInt8Array
    """``uint8 [K, height, width, 3]`` RGB."""
    fingerprint: str
    """SHA-256 of the inputs' bytes."""


def choose_balanced(
    samples: Sequence[Sample], count: int, seed: int = 0, conditions: Mapping[Path, str] | None = None
) -> list[Path]:
    """Choose at most ``count`` images, class by class in turn and within a class condition by condition, seeded.

    No class has more than one image more than another, and within a class no condition more than one more than another,
    unless the other has no more to give.

    Args:
        samples: labelled images.
        count: how many to choose.
        seed: orders the images.
        conditions: under what an image was taken, by image; those that are absent are one condition more.

    Raises:
        DataError: ``count`` is not at least 1.
    """
    if count < 1:
        raise DataError(f"{count} calibration images were asked for; needed at least 1, better 300")
    cells: dict[int, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for path, label in sorted(samples):
        cells[label][(conditions or {}).get(path, "")].append(path)
    generator = random.Random(seed)
    by_class = {label: _in_turn(list(members.values()), generator) for label, members in cells.items()}
    turns = [(turn, label) for label, paths in by_class.items() for turn in range(len(paths))]
    return [by_class[label][turn] for turn, label in sorted(turns)[:count]]


def _in_turn(cells: Sequence[list[Path]], generator: random.Random) -> list[Path]:
    """Shuffle each list, then take one path of each in turn, the lists in another order from class to class.

    With fewer images than cells the first condition would else be the only one that any class has.
    """
    for paths in cells:
        generator.shuffle(paths)
    order = generator.sample(range(len(cells)), len(cells)) if len(cells) > 1 else [0]
    turns = [(turn, place) for place, cell in enumerate(order) for turn in range(len(cells[cell]))]
    return [cells[order[place]][turn] for turn, place in sorted(turns)]


def read_calibration(paths: Sequence[Path], spec: InputSpec) -> Calibration:
    """Decode and prepare images as `Classifier` would. Raises `DataError` for one that cannot be read."""
    if not paths:
        raise DataError("there is no image to calibrate with; needed about 300, balanced by class")
    rows = [prepare(read_image(path), spec) for path in tqdm(paths, "calibration images", disable=None, leave=False)]
    inputs = np.stack(rows)
    return Calibration(inputs, hashlib.sha256(inputs.tobytes()).hexdigest())


def synthetic_frames(spec: InputSpec) -> list[UInt8Array]:
    """Make frames for a golden set where no photographs are given: the same ones every time, ``uint8 [H, W, 3]`` BGR.

    Smooth colour gradients under noise, larger than the network's input, so that crop and resize are proven as well.
    """
    generator = np.random.default_rng(0)
    height, width = spec.height * 5 // 4, spec.width * 3 // 2
    rows, columns = np.linspace(0, 1, height)[:, None, None], np.linspace(0, 1, width)[None, :, None]
    frames = []
    for _ in range(_SYNTHETIC_FRAMES):
        base, (down, right) = generator.uniform(0, 255, 3), generator.uniform(-200, 200, (2, 3))
        noise = generator.normal(0, 20, (height, width, 3))
        frames.append(np.clip(base + down * rows + right * columns + noise, 0, 255).astype(np.uint8))
    return frames


def batches(inputs: UInt8Array, size: int) -> list[UInt8Array]:
    """Cut inputs into batches of exactly ``size``; the last one is filled up from the beginning."""
    missing = -len(inputs) % size
    filled = np.concatenate([inputs, np.resize(inputs, (missing, *inputs.shape[1:]))]) if missing else inputs
    return [filled[first : first + size] for first in range(0, len(filled), size)]
