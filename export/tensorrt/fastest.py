"""The fastest of several plans of one network on this device, by interleaved measurement."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from edgefg.artifact import golden
from edgefg.classifier import Classifier
from edgefg.evaluation.timing import alternate, in_turn

_ROUNDS = 7
_PREDICTIONS = 30


def select_fastest(plans: Mapping[int, Path]) -> tuple[int, dict[int, float]]:
    """Measure plans, in turns, and return the number of the fastest and the median prediction of each, milliseconds.

    Raises:
        EdgefgError: one of them does not run.
    """
    with contextlib.ExitStack() as stack:
        calls = [_prediction(stack.enter_context(Classifier(plan))) for plan in plans.values()]
        seconds = alternate(calls, turns=_ROUNDS, times=_PREDICTIONS)
    times = dict(zip(plans, (1e3 * np.median(seconds, axis=1)).tolist(), strict=True))
    return min(times, key=lambda number: times[number]), times


def _prediction(classifier: Classifier) -> Callable[[], object]:
    """Return a call that predicts one golden frame after the other."""
    assert classifier.manifest.golden is not None
    frames = golden.read(classifier.path.with_name(classifier.manifest.golden.file)).inputs
    return in_turn(lambda frame: classifier.predict(frame, color="rgb"), frames)
