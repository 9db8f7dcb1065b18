"""Which of several plans of one network runs fastest on this device: measured, their turns alternating."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import numpy as np

from edgefg.artifact import golden
from edgefg.classifier import Classifier
from edgefg.evaluation.timing import alternate, in_turn

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
    with contextlib.ExitStack() as stack:
        calls = [_prediction(stack.enter_context(Classifier(plan))) for plan in plans.values()]
        seconds = alternate(calls, turns=_ROUNDS, times=_PREDICTIONS)
    return dict(zip(plans, (1e3 * np.median(seconds, axis=1)).tolist(), strict=True))


def _prediction(classifier: Classifier) -> Callable[[], object]:
    """Return what predicts one golden frame after the other."""
    assert classifier.manifest.golden is not None
    frames = golden.read(classifier.path.with_name(classifier.manifest.golden.file)).inputs
    return in_turn(lambda frame: classifier.predict(frame, color="rgb"), frames)
