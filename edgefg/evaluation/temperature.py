"""Temperature scaling (Guo et al. 2017): one number that calibrates confidences and leaves top-1 unchanged.

Fitted on the artifact's own logits, after quantisation, because quantisation changes them. Runs on devices: no torch,
no SciPy.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from edgefg.artifact.golden import FloatArray
from edgefg.artifact.manifest import TemperatureScaling
from edgefg.metrics import expected_calibration_error, negative_log_likelihood, softmax

IntArray = npt.NDArray[np.int64]
LOWEST, HIGHEST = 0.1, 10.0
"""Bounds of a temperature."""
_LEAST_IMAGES = 20
_PARTS = 5
_GOLDEN = (math.sqrt(5) - 1) / 2
# Of log T, far below the statistical error of any number of images.
_PRECISION = 1e-4


def fit_temperature(logits: FloatArray, labels: IntArray) -> float:
    """Return the temperature in [`LOWEST`, `HIGHEST`] that minimises the negative log-likelihood.

    See Guo et al. 2017, section 4.2. The negative log-likelihood is convex in 1 / T, so it has a single minimum in
    log T too, and a golden-section search finds it. If all N images are right, the optimum is T = 0, which would make
    every confidence 1. The targets are then smoothed as in Platt (1999, section 2.2): each image is right with a
    probability of (N + 1) / (N + 2), Laplace's rule of succession. If all images are wrong, the optimum is infinite and
    1 is returned. 1 is also returned if the temperature that was found makes the likelihood worse.

    Args:
        logits: ``float32 [N, classes]``, finite.
        labels: ``int64 [N]``, class indices.

    Raises:
        ValueError: there is no image, or the lengths differ.
    """
    at_one = negative_log_likelihood(logits, labels)
    right = logits.argmax(axis=1) == labels
    if not right.any():
        return 1.0

    doubt = _mean_gap(logits, labels) / (len(right) + 2) if right.all() else 0.0

    def badness(log_t: float) -> float:
        temperature = math.exp(log_t)
        return negative_log_likelihood(logits, labels, temperature) + doubt / temperature

    best = math.exp(_golden_section(badness, math.log(LOWEST), math.log(HIGHEST)))
    return best if negative_log_likelihood(logits, labels, best) < at_one else 1.0


def scale_temperature(logits: FloatArray, labels: IntArray, data: str) -> tuple[float, TemperatureScaling]:
    """Fit the temperature and cross-validate it.

    The temperature is fitted to all images. The figures after scaling are cross-validated: the images are split at
    random, with a fixed seed, into five parts, and each part is scaled with the temperature of the other four. The
    temperature stays 1, and the reason is recorded, if this makes the likelihoods worse, if there are fewer than 20
    images, or if all images are wrong. If all images are right, the ECE after scaling is one minus the mean confidence.

    The ECE of a few hundred images is biased upwards by chance, before and after scaling.

    Args:
        logits: ``float32 [N, classes]`` of the artifact, finite.
        labels: ``int64 [N]``, class indices.
        data: names the images in the result.

    Raises:
        ValueError: there is no image, or the lengths differ.
    """
    nll = negative_log_likelihood(logits, labels)
    probabilities = softmax(logits)
    ece = expected_calibration_error(probabilities, labels)
    temperature, parts, ece_after, nll_after = 1.0, 0, ece, nll
    unchanged = _why_not_fitted(logits.argmax(axis=1) == labels)
    if not unchanged:
        unseen = _cross_validated(logits, labels)
        unseen_nll = negative_log_likelihood(unseen, labels)
        if unseen_nll < nll:
            temperature, parts = fit_temperature(logits, labels), _PARTS
            ece_after, nll_after = expected_calibration_error(softmax(unseen), labels), unseen_nll
        else:
            unchanged = f"the fitted one does not improve unseen images: NLL {unseen_nll:.4f} instead of {nll:.4f}"
    return temperature, TemperatureScaling(
        data=data,
        images=len(labels),
        parts=parts,
        ece_before=ece,
        ece_after=ece_after,
        nll_before=nll,
        nll_after=nll_after,
        unchanged=unchanged,
    )


def _why_not_fitted(right: npt.NDArray[np.bool_]) -> str:
    """Return why no temperature can be fitted; empty if one can."""
    if len(right) < _LEAST_IMAGES:
        return f"{len(right)} images are too few; at least {_LEAST_IMAGES} are needed, better hundreds"
    return "" if right.any() else f"all {len(right)} images are wrong"


def _cross_validated(logits: FloatArray, labels: IntArray) -> FloatArray:
    """Divide each part's logits by the temperature of all other parts."""
    part = np.random.default_rng(0).permutation(len(labels)) % _PARTS
    scaled = np.empty_like(logits)
    for number in range(_PARTS):
        here = part == number
        scaled[here] = logits[here] / fit_temperature(logits[~here], labels[~here])
    return scaled


def _mean_gap(logits: FloatArray, labels: IntArray) -> float:
    """Return by how much an image's own logit exceeds the mean of the others, on average.

    With a share d of the target spread over the others, cross entropy grows by d times this over T:
    (1 - d) log p_y + d/(C-1) Σ log p_j = log p_y - d (z_y - mean z_j) / T, sum and mean over j ≠ y.
    """
    others = logits.shape[1] - 1
    own = logits[np.arange(len(labels)), labels]
    return float((own - (logits.sum(axis=1) - own) / max(1, others)).mean())


def _golden_section(function: Callable[[float], float], low: float, high: float) -> float:
    """Return the minimum of a unimodal function between two points (Kiefer 1953)."""
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = function(left), function(right)
    while high - low > _PRECISION:
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - _GOLDEN * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + _GOLDEN * (high - low)
            at_right = function(right)
    return (low + high) / 2
