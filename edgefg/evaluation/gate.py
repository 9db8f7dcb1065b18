"""The acceptance gate: an artifact is compared with its parent on the same images and held to limits.

Every limit allows for chance, since a validation split has few images, and many classes have very few:

- The drop of top-1 fails if it exceeds its limit by more than its standard error (about 0.9 points on 300 images, 0.25
  on 3,000). Without this allowance, a limit of 1 point would fail one sound INT8 artifact in 20 on 300 images.
- A class fails if its recall drops by more than its limit **and** chance does not explain the loss. A sound artifact is
  assumed to lose each image that its parent has right with a probability of 2 % (measured: 0.6 to 1.1 %). The lost
  images of one class must be less probable than 5 % (exact binomial test, Bonferroni correction for the number of
  classes). So three of eight images are significant, among ten classes and among eighty. A single image never is, and
  two are significant only if the parent had no other image of the class right.
- The flips, images that the parent has right and the artifact wrong, fail if they exceed their limit by more than a
  standard error. Gains do not offset them: an artifact that gains one class and loses another behaves differently.

McNemar's p and the 95 % interval of the drop are reported, but are not limits: with enough images the smallest drop is
significant, and with few images a large one is not.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edgefg.artifact.golden import FloatArray
from edgefg.artifact.manifest import Accuracy, ClassDrop, Comparison, Flip
from edgefg.errors import ParityError
from edgefg.evaluation.views import confusions
from edgefg.metrics import mcnemar_p, score
from edgefg.settings.gate import Gate

IntArray = npt.NDArray[np.int64]
CHANCE = 0.02
"""Probability with which a sound artifact loses an image that its parent has right."""
SIGNIFICANCE = 0.05
_Z = NormalDist().inv_cdf(0.975)
_KEPT = 5
_NAMED = 10


class Verdict(NamedTuple):
    """An artifact compared with its parent, and the limits that do not hold."""

    comparison: Comparison
    classes: tuple[ClassDrop, ...]
    """Every class that loses images; `comparison` has the worst.

    They are sorted by how improbable the loss is by chance, the least probable first.
    """
    failures: tuple[str, ...]
    """One clause for each limit that does not hold, with the classes concerned; empty if all hold."""


def compare(
    logits: FloatArray, parent: FloatArray, labels: IntArray, names: tuple[str, ...], data: str, gate: Gate | None
) -> Verdict:
    """Compare an artifact with its parent on the same images, and judge it.

    Args:
        logits: ``float32 [N, classes]`` of the artifact.
        parent: the parent's, likewise.
        labels: ``int64 [N]``, class indices.
        names: the class names.
        data: names the images in the result.
        gate: the limits; None measures only.

    Raises:
        ParityError: a logit is not finite.
    """
    if not (np.isfinite(logits).all() and np.isfinite(parent).all()):
        raise ParityError("a logit is not finite; export the artifact again")
    found, expected = logits.argmax(axis=1), parent.argmax(axis=1)
    right, parent_right = found == labels, expected == labels
    lost, gained = int((parent_right & ~right).sum()), int((~parent_right & right).sum())
    middle, error = paired_error(lost, gained, len(labels))
    classes = _class_drops(right, parent_right, labels, names)
    flipped = parent_right & ~right
    pairs = confusions(found[flipped], labels[flipped], len(names)) if lost else ()
    comparison = Comparison(
        parent=Accuracy.of(score(parent, labels, len(names)), data),
        drop=100 * (lost - gained) / len(labels),
        drop_low=100 * max(-1.0, middle - _Z * error),
        drop_high=100 * min(1.0, middle + _Z * error),
        drop_error=100 * error,
        lost=lost,
        gained=gained,
        mcnemar_p=mcnemar_p(right, parent_right),
        agreement=float((found == expected).mean()),
        logits=float(np.abs(logits - parent).max()),
        parent_logits_max=float(np.abs(parent).max()),
        worst=tuple(drop for i, drop in enumerate(classes) if i < _KEPT or drop.chance <= SIGNIFICANCE),
        flips=tuple(Flip(label=names[a], predicted=names[b], images=count) for a, b, count in pairs[:_KEPT]),
        gate=gate,
    )
    return Verdict(comparison, classes, () if gate is None else judge(comparison, gate))


def paired_error(lost: int, gained: int, images: int) -> tuple[float, float]:
    """Estimate (lost - gained) / images, the difference of two shares of the same images, and its standard error.

    This is the adjusted Wald interval for paired samples (Bonett & Price 2012). One image is added to both kinds, which
    keeps the coverage of the interval if few images differ.

    Args:
        lost: images that only the first of the two has right.
        gained: images that only the second one has right.
        images: all of them, at least 1.

    Returns:
        The adjusted difference, the middle of its interval, and its standard error.
    """
    first, second = (lost + 1) / (images + 2), (gained + 1) / (images + 2)
    return first - second, math.sqrt((first + second - (first - second) ** 2) / (images + 2))


def chance_of(lost: int, images: int, classes: int) -> float:
    """Return the probability that at least one class loses this many images by chance.

    It is 1 for a single image, and for two images of a class of which the parent had more right.

    Args:
        lost: images that the class lost, less those that it gained.
        images: how many of its images the parent had right, at least ``lost``.
        classes: the number of classes, for the Bonferroni correction.

    Returns:
        P(X ≥ lost) of the binomial distribution of ``images`` at `CHANCE`, times ``classes`` (Bonferroni), at most 1.
    """
    if lost < 2 or lost == 2 < images:
        return 1.0
    odds = CHANCE / (1 - CHANCE)
    # From the mean outwards, so that what rounds to nothing is nothing, in a class of many thousands too.
    if lost > images * CHANCE:
        term = tail = _binomial(lost, images)
        for k in range(lost, images):
            term *= (images - k) / (k + 1) * odds
            tail += term
    else:
        term = fewer = _binomial(lost - 1, images)
        for k in range(lost - 1, 0, -1):
            term *= k / (images - k + 1) / odds
            fewer += term
        tail = 1 - fewer
    return min(1.0, tail * classes)


def _binomial(k: int, images: int) -> float:
    ways = math.lgamma(images + 1) - math.lgamma(k + 1) - math.lgamma(images - k + 1)
    return math.exp(ways + k * math.log(CHANCE) + (images - k) * math.log1p(-CHANCE))


def _class_drops(
    right: npt.NDArray[np.bool_], parent_right: npt.NDArray[np.bool_], labels: IntArray, names: tuple[str, ...]
) -> tuple[ClassDrop, ...]:
    """Return the classes that lose images, sorted by how improbable the loss is by chance, the least probable first."""
    images, before, after = (
        np.bincount(labels[kind], minlength=len(names)).tolist() for kind in (slice(None), parent_right, right)
    )
    classes = sum(count > 0 for count in before)
    drops = [
        ClassDrop(
            label=names[i],
            images=images[i],
            parent_recall=before[i] / images[i],
            recall=after[i] / images[i],
            chance=chance_of(before[i] - after[i], before[i], classes),
        )
        for i in range(len(names))
        if before[i] > after[i]
    ]
    return tuple(sorted(drops, key=lambda drop: (drop.chance, (drop.recall - drop.parent_recall) * drop.images)))


def judge(found: Comparison, gate: Gate) -> tuple[str, ...]:
    """Return one clause for each limit that does not hold, with the classes concerned."""
    images = found.parent.images
    on = f"on {found.parent.data} ({images} images)"
    worst = f"; worst class: {found.worst[0].label}" if found.worst else ""
    failures = []
    if found.drop - found.drop_error > gate.max_drop:
        failures.append(
            f"top-1 drops by {found.drop:.2f} ± {found.drop_error:.2f} points against the parent {on}, allowed are"
            f" {gate.max_drop:g}{worst}"
        )
    too_much = [drop for drop in found.worst if _is_lost(drop, gate)]
    if too_much:
        failures.append(
            f"{'a class loses' if len(too_much) == 1 else f'{len(too_much)} classes lose'} more than"
            f" {gate.max_class_drop:g} points of recall {on}: {_named([drop.render() for drop in too_much])}"
        )
    error = math.sqrt(found.lost * (1 - found.lost / images))
    if 100 * (found.lost - error) > gate.max_flips * images:
        pairs = _named([flip.render() for flip in found.flips])
        failures.append(
            f"{found.lost} images that the parent has right flip {on}, allowed are {gate.max_flips:g} %: {pairs}"
        )
    if found.agreement < gate.min_agreement:
        failures.append(
            f"artifact and parent agree on {found.agreement:.2%} of {images} images, required are"
            f" {gate.min_agreement:.2%}{worst}"
        )
    return tuple(failures)


def _is_lost(drop: ClassDrop, gate: Gate) -> bool:
    points = 100 * (drop.parent_recall - drop.recall)
    return points > gate.max_class_drop and drop.chance <= SIGNIFICANCE


def _named(texts: list[str]) -> str:
    return ", ".join(texts[:_NAMED]) + (f" and {len(texts) - _NAMED} more" if len(texts) > _NAMED else "")
