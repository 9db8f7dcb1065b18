"""Pictures that a data set has twice: the same file, or the same picture saved, scaled or flipped anew.

A picture in two splits makes the figures of one of them worthless; a picture under two labels is a label error.

Same files share their SHA-256. Near duplicates are proposed by a 64-bit perceptual hash (pHash: the 64 lowest
frequencies of the 32×32 grey picture's cosine transform, each above or below their median; Zauner, "Implementation and
Benchmarking of Perceptual Image Hash Functions", 2010) and confirmed by the correlation of 16×16 grey pictures. Every
picture is compared with every other, block by block: 10,000 pictures take seconds, 100,000 minutes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from edgefg.data.split import Sample
from edgefg.errors import DataError
from edgefg.image_io import decode_image, read_image
from edgefg.preprocess import UInt8Array

SIDE = 32
"""Width and height of the small grey pictures."""
MAX_DISTANCE = 10
"""Greatest Hamming distance of two hashes, of 64 bits, whose pictures are looked at more closely."""
MIN_CORRELATION = 0.95
"""Least correlation of near duplicates."""
# On shared/data/grocery these find every copy scaled by 0.5–2 and 99.5 % of the flipped ones (with a full decode also
# those at JPEG quality 50 or brightened). Of its 14.7 million pairs of photographs 24 pass: all show one and the same.
_LOW = 8
_BLOCK = 2048
_CHUNK = 1 << 16

Float = npt.NDArray[np.float32]


class Pair(msgspec.Struct, frozen=True, kw_only=True):
    """A picture that is there twice."""

    first: str
    second: str
    """Paths of the two images."""
    splits: tuple[str, str]
    labels: tuple[int, int]
    """Their class indices."""
    exact: bool
    """Whether the files are the same, byte by byte."""
    flipped: bool = False
    """Whether one is the other's mirror image."""
    correlation: float = 1.0
    """Of the small grey pictures, in [−1, 1]."""


class Duplicates(msgspec.Struct, frozen=True, kw_only=True):
    """What `find_duplicates` finds."""

    across: tuple[Pair, ...]
    """Pairs in two splits, exact ones first."""
    relabelled: tuple[Pair, ...]
    """Pairs with two labels, exact ones first; some may lie across splits too."""
    within: dict[str, int]
    """How many pairs with one label lie within each split."""


class _Match(NamedTuple):
    first: int
    second: int
    exact: bool
    flipped: bool
    correlation: float


def find_duplicates(splits: Mapping[str, Sequence[Sample]], digests: Mapping[Path, str]) -> Duplicates:
    """Find the same and nearly the same pictures of a data set.

    Of the images that share a digest only the first is compared further.

    Args:
        splits: samples by split; all are readable.
        digests: SHA-256 of every image.

    Raises:
        DataError: an image cannot be read.
    """
    entries = [(split, sample) for split, samples in splits.items() for sample in samples]
    across, relabelled, within = [], [], Counter(dict.fromkeys(splits, 0))
    for match in _matches([sample.path for _, sample in entries], digests):
        (split, one), (other, two) = entries[match.first], entries[match.second]
        if split == other and one.label == two.label:
            within[split] += 1
            continue
        pair = Pair(
            first=str(one.path),
            second=str(two.path),
            splits=(split, other),
            labels=(one.label, two.label),
            exact=match.exact,
            flipped=match.flipped,
            correlation=match.correlation,
        )
        if split != other:
            across.append(pair)
        if one.label != two.label:
            relabelled.append(pair)
    return Duplicates(across=tuple(across), relabelled=tuple(relabelled), within=dict(within))


def _matches(paths: Sequence[Path], digests: Mapping[Path, str]) -> Iterator[_Match]:
    """Yield exact matches, each with the first of its kind, then near ones among the first of every kind."""
    first: dict[str, int] = {}
    for i, path in enumerate(paths):
        twin = first.setdefault(digests[path], i)
        if twin != i:
            yield _Match(twin, i, exact=True, flipped=False, correlation=1.0)
    unique = list(first.values())
    if len(unique) > 1:
        small = np.stack([thumbnail(paths[i]) for i in unique])
        for i, j, flipped, correlation in near_matches(small):
            yield _Match(unique[i], unique[j], exact=False, flipped=flipped, correlation=round(correlation, 4))


def thumbnail(path: Path) -> UInt8Array:
    """Return an image as ``uint8 [SIDE, SIDE]``, grey. Raises `DataError` where it cannot be read."""
    import cv2

    try:
        image = decode_image(path.read_bytes(), str(path), reduced=True)
    except OSError as exc:
        raise DataError(f"cannot read {path}: {exc.strerror}") from exc
    if min(image.shape[:2]) < SIDE:
        image = read_image(path)
    small = cv2.resize(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    return np.asarray(small, np.uint8)


def perceptual_hash(small: UInt8Array) -> Float:
    """Hash small grey pictures.

    Args:
        small: ``uint8 [N, SIDE, SIDE]``.

    Returns:
        The 64 bits as ``float32 [N, 64]`` of −1 and 1, so that the product of two hashes is 64 minus twice their
        Hamming distance; zeros where a picture is of a single tone, which looks like every other of that kind.
    """
    frequency, place = np.arange(_LOW)[:, None], np.arange(SIDE)[None]
    cosines = np.cos(np.pi * frequency * (2 * place + 1) / (2 * SIDE)).astype(np.float32)  # DCT-II
    low = cosines @ small.astype(np.float32) @ cosines.T
    flat: Float = low.reshape(len(small), -1)
    flat[:, 0] = 0.0  # the mean brightness says nothing of the picture
    bits = np.where(flat > np.median(flat, axis=1, keepdims=True), 1.0, -1.0).astype(np.float32)
    bits[small.reshape(len(small), -1).std(axis=1) < 1.0] = 0.0
    return bits


def near_matches(small: UInt8Array) -> Iterator[tuple[int, int, bool, float]]:
    """Compare small grey pictures, ``uint8 [N, SIDE, SIDE]``, as they are and mirrored.

    Yields:
        Two positions, the smaller one first; whether one is the mirror image; and the correlation. The likelier of both
        ways where both hold.
    """
    hashes, mirrored = perceptual_hash(small), perceptual_hash(small[:, :, ::-1])
    tiles, turned = _normalised(small), _normalised(small[:, :, ::-1])
    for row in range(0, len(small), _BLOCK):
        for column in range(row, len(small), _BLOCK):
            best: dict[tuple[int, int], tuple[float, bool]] = {}
            for flipped, bits, against in ((False, hashes, tiles), (True, mirrored, turned)):
                close = hashes[row : row + _BLOCK] @ bits[column : column + _BLOCK].T >= 64 - 2 * MAX_DISTANCE
                for i, j, correlation in _confirmed(tiles, against, np.argwhere(close) + np.array([row, column])):
                    if correlation > best.get((i, j), (0.0, False))[0]:
                        best[i, j] = (correlation, flipped)
            for (i, j), (correlation, flipped) in sorted(best.items()):
                yield i, j, flipped, correlation


def _confirmed(left: Float, right: Float, places: npt.NDArray[np.intp]) -> Iterable[tuple[int, int, float]]:
    """Yield of the places ``[n, 2]`` above the diagonal those whose pictures correlate well enough."""
    places = places[places[:, 0] < places[:, 1]]
    for start in range(0, len(places), _CHUNK):
        part = places[start : start + _CHUNK]
        correlations = (left[part[:, 0]] * right[part[:, 1]]).sum(axis=1)
        for k in np.flatnonzero(correlations >= MIN_CORRELATION):
            yield int(part[k, 0]), int(part[k, 1]), min(1.0, float(correlations[k]))


def _normalised(small: UInt8Array) -> Float:
    """Halve pictures, and give them mean 0 and length 1: ``float32 [N, (SIDE/2)²]``, whose products correlate them."""
    halved = small.reshape(len(small), SIDE // 2, 2, SIDE // 2, 2).mean(axis=(2, 4), dtype=np.float32)
    flat: Float = halved.reshape(len(small), -1)
    flat -= flat.mean(axis=1, keepdims=True)
    flat /= np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)
    return flat
