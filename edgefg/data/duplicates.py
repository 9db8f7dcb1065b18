"""Duplicate images: identical files, and pictures that were saved again, resized or mirrored.

A picture in two splits invalidates the figures of one of them; a picture with two labels is a label error.

Identical files have the same SHA-256. Near duplicates are proposed by a 64-bit perceptual hash (pHash: the 64 lowest
frequencies of the 32×32 grey picture's cosine transform, each above or below their median; Zauner, "Implementation and
Benchmarking of Perceptual Image Hash Functions", 2010) and confirmed by the correlation of 16×16 grey pictures. All
pairs are compared, block by block: 10,000 pictures take seconds, 100,000 take minutes.
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
from edgefg.progress import track

SIDE = 32
"""Width and height of the small grey pictures."""
MAX_DISTANCE = 10
"""Largest Hamming distance between 64-bit hashes whose pictures are compared in detail."""
MIN_CORRELATION = 0.95
"""Smallest correlation of near duplicates."""
# On shared/data/grocery these find every copy scaled by 0.5–2 and 99.5 % of the mirrored ones (with a full decode also
# those at JPEG quality 50 or brightened). Of 14.7 million pairs of photographs, 24 pass, and all are true duplicates.
_LOW = 8
_BLOCK = 2048
_CHUNK = 1 << 16

Float = npt.NDArray[np.float32]


class Pair(msgspec.Struct, frozen=True, kw_only=True):
    """Two images of the same picture."""

    first: str
    second: str
    """Paths of the two images."""
    splits: tuple[str, str]
    labels: tuple[int, int]
    """Their class indices."""
    exact: bool
    """Whether the files are identical."""
    mirrored: bool = False
    """Whether one is the mirror image of the other."""
    correlation: float = 1.0
    """Correlation of the small grey pictures, in [−1, 1]."""


class Duplicates(msgspec.Struct, frozen=True, kw_only=True):
    """Duplicates in a data set."""

    across_splits: tuple[Pair, ...]
    """Pairs in two splits, exact ones first."""
    across_labels: tuple[Pair, ...]
    """Pairs with two labels, exact ones first; may be in two splits as well."""
    within_split: dict[str, int]
    """Number of pairs with the same label within each split."""


class _Match(NamedTuple):
    first: int
    second: int
    exact: bool
    mirrored: bool
    correlation: float


def find_duplicates(splits: Mapping[str, Sequence[Sample]], digests: Mapping[Path, str]) -> Duplicates:
    """Find identical files and near duplicates.

    Of several identical files, only the first is compared with other pictures.

    Args:
        splits: samples by split, all readable.
        digests: SHA-256 of every image.

    Raises:
        DataError: an image cannot be read.
    """
    entries = [(split, sample) for split, samples in splits.items() for sample in samples]
    across_splits, across_labels, within_split = [], [], Counter(dict.fromkeys(splits, 0))
    for match in _matches([sample.path for _, sample in entries], digests):
        (split, one), (other, two) = entries[match.first], entries[match.second]
        if split == other and one.label == two.label:
            within_split[split] += 1
            continue
        pair = Pair(
            first=str(one.path),
            second=str(two.path),
            splits=(split, other),
            labels=(one.label, two.label),
            exact=match.exact,
            mirrored=match.mirrored,
            correlation=match.correlation,
        )
        if split != other:
            across_splits.append(pair)
        if one.label != two.label:
            across_labels.append(pair)
    return Duplicates(
        across_splits=tuple(across_splits), across_labels=tuple(across_labels), within_split=dict(within_split)
    )


def _matches(paths: Sequence[Path], digests: Mapping[Path, str]) -> Iterator[_Match]:
    """Yield identical files, each with the first of its kind, then near duplicates among distinct files."""
    first: dict[str, int] = {}
    for i, path in enumerate(paths):
        twin = first.setdefault(digests[path], i)
        if twin != i:
            yield _Match(twin, i, exact=True, mirrored=False, correlation=1.0)
    unique = list(first.values())
    if len(unique) > 1:
        small = np.stack([thumbnail(paths[i]) for i in track(unique, "searching for duplicates")])
        for i, j, mirrored, correlation in near_matches(small):
            yield _Match(unique[i], unique[j], exact=False, mirrored=mirrored, correlation=round(correlation, 4))


def thumbnail(path: Path) -> UInt8Array:
    """Return an image as ``uint8 [SIDE, SIDE]``, grey. Raises `DataError` if it cannot be read."""
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
    """Compute perceptual hashes of small grey pictures.

    Args:
        small: ``uint8 [N, SIDE, SIDE]``.

    Returns:
        ``float32 [N, 64]`` of −1 and 1, so that the product of two hashes is 64 minus twice their Hamming distance.
        Zeros for a picture of a single tone, which would match every other such picture.
    """
    frequency, place = np.arange(_LOW)[:, None], np.arange(SIDE)[None]
    cosines = np.cos(np.pi * frequency * (2 * place + 1) / (2 * SIDE)).astype(np.float32)  # DCT-II
    low = cosines @ small.astype(np.float32) @ cosines.T
    flat: Float = low.reshape(len(small), -1)
    flat[:, 0] = 0.0  # the mean brightness does not identify a picture
    bits = np.where(flat > np.median(flat, axis=1, keepdims=True), 1.0, -1.0).astype(np.float32)
    bits[small.reshape(len(small), -1).std(axis=1) < 1.0] = 0.0
    return bits


def near_matches(small: UInt8Array) -> Iterator[tuple[int, int, bool, float]]:
    """Compare all pairs of small grey pictures, ``uint8 [N, SIDE, SIDE]``, as they are and mirrored.

    Yields:
        Two positions, the smaller one first; whether one picture is mirrored; and the correlation. If a pair matches
        both ways, the one with the higher correlation.
    """
    hashes, tiles = perceptual_hash(small), _normalised(small)
    mirrored_hashes, mirrored_tiles = perceptual_hash(small[:, :, ::-1]), _normalised(small[:, :, ::-1])
    for row in range(0, len(small), _BLOCK):
        for column in range(row, len(small), _BLOCK):
            best: dict[tuple[int, int], tuple[float, bool]] = {}
            for mirrored, bits, others in ((False, hashes, tiles), (True, mirrored_hashes, mirrored_tiles)):
                close = hashes[row : row + _BLOCK] @ bits[column : column + _BLOCK].T >= 64 - 2 * MAX_DISTANCE
                for i, j, correlation in _correlated(tiles, others, np.argwhere(close) + np.array([row, column])):
                    if correlation > best.get((i, j), (0.0, False))[0]:
                        best[i, j] = (correlation, mirrored)
            for (i, j), (correlation, mirrored) in sorted(best.items()):
                yield i, j, mirrored, correlation


def _correlated(left: Float, right: Float, pairs: npt.NDArray[np.intp]) -> Iterable[tuple[int, int, float]]:
    """Yield those of the pairs ``[n, 2]`` above the diagonal that correlate well enough, with the correlation."""
    pairs = pairs[pairs[:, 0] < pairs[:, 1]]
    for start in range(0, len(pairs), _CHUNK):
        part = pairs[start : start + _CHUNK]
        correlations = (left[part[:, 0]] * right[part[:, 1]]).sum(axis=1)
        for k in np.flatnonzero(correlations >= MIN_CORRELATION):
            yield int(part[k, 0]), int(part[k, 1]), min(1.0, float(correlations[k]))


def _normalised(small: UInt8Array) -> Float:
    """Halve pictures and scale them to mean 0 and length 1: ``float32 [N, (SIDE/2)²]``. Products are correlations."""
    halved = small.reshape(len(small), SIDE // 2, 2, SIDE // 2, 2).mean(axis=(2, 4), dtype=np.float32)
    flat: Float = halved.reshape(len(small), -1)
    flat -= flat.mean(axis=1, keepdims=True)
    flat /= np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)
    return flat
