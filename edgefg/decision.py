"""From logits to a prediction: temperature, top-k, rejection, roll-up along the taxonomy."""

from __future__ import annotations

import math
import time

import msgspec
import numpy as np
import numpy.typing as npt

from edgefg.artifact.manifest import Manifest
from edgefg.errors import InferenceError
from edgefg.metrics import scaled_exponentials
from edgefg.taxonomy import TaxonomyLevel


class Timings(msgspec.Struct, frozen=True):
    """Time of each stage of a prediction, in milliseconds."""

    preprocess: float
    infer: float
    decide: float

    @property
    def total(self) -> float:
        """Sum of the stages, in milliseconds."""
        return self.preprocess + self.infer + self.decide


class ClassProbability(msgspec.Struct, frozen=True):
    """A class and its probability."""

    label: str
    index: int
    confidence: float


class Rollup(msgspec.Struct, frozen=True):
    """The finest group of the taxonomy that reaches the rejection threshold if the class does not."""

    level: str
    group: str
    confidence: float


class Prediction(msgspec.Struct, frozen=True, eq=False, kw_only=True):
    """Classification of one frame."""

    label: str
    index: int
    """Position of the label in the manifest's labels."""
    confidence: float
    """Softmax probability after temperature, in [0, 1]."""
    top_k: tuple[ClassProbability, ...]
    """The most probable classes, best first; ties go to the lower index."""
    logits: npt.NDArray[np.float32]
    """``float32 [classes]``, as returned by the network."""
    timings: Timings
    rejected: bool = False
    """Whether the confidence is below the manifest's rejection threshold."""
    rollup: Rollup | None = None
    """For a rejected frame of an artifact with a taxonomy: the finest group whose probability reaches the threshold."""


def decide(
    logits: npt.NDArray[np.float32], manifest: Manifest, top_k: int, before_ms: tuple[float, float] = (0.0, 0.0)
) -> Prediction:
    """Make the prediction of one frame from its logits, ``float32 [classes]``.

    The temperature, the rejection threshold and the taxonomy are the manifest's. ``before_ms`` is the time that
    preprocessing and inference took, in milliseconds.

    Raises:
        InferenceError: a logit is NaN or infinite.
    """
    start = time.perf_counter()
    # Few NumPy calls: right after an inference, with cold caches, each costs several microseconds.
    greatest = float(logits.max())
    if not (math.isfinite(greatest) and math.isfinite(float(logits.min()))):  # a NaN spreads to both
        worst = int(np.flatnonzero(~np.isfinite(logits))[0])
        raise InferenceError(
            f"{manifest.model} returned logits that are not finite ({logits[worst]} for class {worst}): overflow in the"
            " engine's arithmetic; run `edgefg verify`, and export with --precision fp32 if it fails"
        )
    exponentials = scaled_exponentials(logits, greatest, manifest.output.temperature)
    total = float(exponentials.sum())
    # By the logits: probabilities round near ties together.
    order = np.argsort(-logits, kind="stable")[:top_k].tolist()
    best = tuple(ClassProbability(manifest.labels[i], i, float(exponentials[i]) / total) for i in order)
    threshold = manifest.output.reject_threshold
    rejected = threshold is not None and not best[0].confidence >= threshold
    rollup = None
    if rejected and threshold is not None:
        rollup = _roll_up(exponentials / total, manifest.taxonomy, threshold)
    return Prediction(
        label=best[0].label,
        index=best[0].index,
        confidence=best[0].confidence,
        top_k=best,
        logits=logits,
        timings=Timings(*before_ms, (time.perf_counter() - start) * 1e3),
        rejected=rejected,
        rollup=rollup,
    )


def _roll_up(
    probabilities: npt.NDArray[np.float64], taxonomy: tuple[TaxonomyLevel, ...], threshold: float
) -> Rollup | None:
    """Walk the levels from fine to coarse and return the first whose best group reaches the threshold."""
    for level in taxonomy:
        sums: dict[str, float] = {}
        for group, probability in zip(level.groups, probabilities.tolist(), strict=True):
            sums[group] = sums.get(group, 0.0) + probability
        group, confidence = max(sums.items(), key=lambda item: item[1])
        if confidence >= threshold:
            return Rollup(level.name, group, min(confidence, 1.0))
    return None
