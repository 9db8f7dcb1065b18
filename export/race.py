"""Which of several plans of one network runs fastest on this device: measured, their turns alternating."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec

from edgefg import golden
from edgefg.classifier import Classifier
from edgefg.preprocess import UInt8Array

_ROUNDS = 7
_PREDICTIONS = 30


class Candidate(msgspec.Struct, frozen=True):
    """One of the models that were built, and how fast its plan was."""

    model: str
    precision: str
    p50_ms: float | None = None
    """Median of `Classifier.predict` on the golden frames; None where there was nothing to compare it with."""
    problem: str = ""
    """Why it could not be taken."""


def measure(plans: Mapping[int, Path]) -> dict[int, float]:
    """Return the median time of a prediction, milliseconds, of every plan, by number; their turns alternate.

    Raises:
        EdgefgError: one of them does not run.
    """
    times: dict[int, list[float]] = {number: [] for number in plans}
    opened: dict[int, tuple[Classifier, UInt8Array]] = {}
    with contextlib.ExitStack() as stack:
        for number, plan in plans.items():
            classifier = stack.enter_context(Classifier(plan))
            assert classifier.manifest.golden is not None
            opened[number] = classifier, golden.read(plan.with_name(classifier.manifest.golden.file)).inputs
        for turn in range(_ROUNDS + 1):
            for number, (classifier, frames) in opened.items():
                for i in range(_PREDICTIONS):
                    start = time.perf_counter()
                    classifier.predict(frames[i % len(frames)], color="rgb")
                    if turn:  # the first turn warms up
                        times[number].append((time.perf_counter() - start) * 1e3)
    return {number: statistics.median(found) for number, found in times.items()}
