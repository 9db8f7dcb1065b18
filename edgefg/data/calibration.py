"""Calibration images: chosen from the training split and preprocessed as on the device.

They are balanced over the classes and, within a class, over the conditions that the data set names. A network that is
calibrated only with daylight images clips activations at night.
"""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from edgefg.data.split import Sample
from edgefg.errors import DataError
from edgefg.image_io import read_image
from edgefg.preprocess import InputSpec, UInt8Array, prepare
from edgefg.progress import track

_SYNTHETIC_FRAMES = 8


class Calibration(msgspec.Struct, frozen=True, eq=False):
    """Calibration inputs of a network."""

    inputs: UInt8Array
    """``uint8 [K, height, width, 3]`` RGB."""
    fingerprint: str
    """SHA-256 of the inputs' bytes."""


def choose_balanced(
    samples: Sequence[Sample], num_samples: int, seed: int = 0, conditions: Mapping[Path, str] | None = None
) -> list[Path]:
    """Choose at most ``num_samples`` images, balanced over classes and, within a class, over conditions.

    The numbers of images of two classes differ by at most 1, unless a class has too few; likewise for the conditions
    within a class.

    Args:
        samples: labelled images.
        num_samples: number of images to choose.
        seed: seed of the random order.
        conditions: conditions of the images; images without one form a further condition.

    Raises:
        DataError: ``num_samples`` is less than 1.
    """
    if num_samples < 1:
        raise DataError(f"cannot calibrate with {num_samples} images; choose at least 1, better 300")
    cells: dict[int, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for path, label in sorted(samples):
        cells[label][(conditions or {}).get(path, "")].append(path)
    generator = random.Random(seed)
    by_class = {label: _interleave(list(members.values()), generator) for label, members in cells.items()}
    turns = [(turn, label) for label, paths in by_class.items() for turn in range(len(paths))]
    return [by_class[label][turn] for turn, label in sorted(turns)[:num_samples]]


def _interleave(cells: Sequence[list[Path]], generator: random.Random) -> list[Path]:
    """Shuffle each list, then take one path of each in turn, with the lists in random order.

    With a fixed order, the first condition would be the only one if there are fewer images than cells.
    """
    for paths in cells:
        generator.shuffle(paths)
    order = generator.sample(range(len(cells)), len(cells)) if len(cells) > 1 else [0]
    turns = [(turn, place) for place, cell in enumerate(order) for turn in range(len(cells[cell]))]
    return [cells[order[place]][turn] for turn, place in sorted(turns)]


def read_calibration(paths: Sequence[Path], spec: InputSpec) -> Calibration:
    """Decode and preprocess images as `Classifier` does. Raises `DataError` if one cannot be read."""
    if not paths:
        raise DataError("there are no calibration images; give about 300, balanced by class")
    rows = [prepare(read_image(path), spec) for path in track(paths, "reading calibration images")]
    inputs = np.stack(rows)
    return Calibration(inputs, hashlib.sha256(inputs.tobytes()).hexdigest())


def synthetic_frames(spec: InputSpec) -> list[UInt8Array]:
    """Return frames for a golden set if no photographs are given: always the same, ``uint8 [H, W, 3]`` BGR.

    Colour gradients with noise, larger than the network's input, so that crop and resize are tested as well.
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
    """Cut inputs into batches of exactly ``size``; the last one is filled up with the first inputs."""
    missing = -len(inputs) % size
    filled = np.concatenate([inputs, np.resize(inputs, (missing, *inputs.shape[1:]))]) if missing else inputs
    return [filled[first : first + size] for first in range(0, len(filled), size)]
