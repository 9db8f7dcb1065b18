"""Measure a new artifact and its parent on validation images; the manifest records the result.

Runs on devices: the parent is any function of frames, so no torch is needed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from edgefg.artifact.manifest import Accuracy, Comparison, TemperatureScaling
from edgefg.classifier import Classifier
from edgefg.errors import GateError
from edgefg.evaluation.gate import compare
from edgefg.evaluation.predictions import LogitsFunction, artifact_logits, predict_files
from edgefg.evaluation.temperature import scale_temperature
from edgefg.metrics import score
from edgefg.settings.gate import Gate


class Validation(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of an artifact on validation images."""

    accuracy: Accuracy
    temperature: float = 1.0
    scaling: TemperatureScaling | None = None
    """How the temperature was found; None if none was fitted."""
    comparison: Comparison | None = None
    """With its parent, if there is one."""


def validate(
    classifier: Classifier,
    samples: Sequence[tuple[Path, int]],
    data: str,
    *,
    parent: LogitsFunction | None = None,
    gate: Gate | None = None,
    fit_temperature: bool = True,
) -> Validation:
    """Measure an artifact's accuracy and its loss against the parent, and fit its temperature.

    Args:
        classifier: the artifact.
        samples: labelled images (path, class index), at least one.
        data: names them in the results.
        parent: the parent's logits of the same frames.
        gate: the limits against the parent; None only measures.
        fit_temperature: whether to fit the temperature to these images.

    Raises:
        GateError: a limit does not hold; the message names the classes.
        ParityError: the parent gave a logit that is not finite.
        DataError, InferenceError: see `edgefg.evaluation.predictions.predict_files`.
    """
    models = [artifact_logits(classifier)] if parent is None else [artifact_logits(classifier), parent]
    logits, *others = predict_files(models, [path for path, _ in samples]).logits
    labels: npt.NDArray[np.int64] = np.array([label for _, label in samples], np.int64)
    comparison = None
    for before in others:
        verdict = compare(logits, before, labels, classifier.labels, data, gate)
        comparison = verdict.comparison
        require_gate(verdict.failures, "the artifact")
    temperature, scaling = scale_temperature(logits, labels, data) if fit_temperature else (1.0, None)
    return Validation(
        accuracy=Accuracy.of(score(logits, labels, len(classifier.labels)), data),
        temperature=temperature,
        scaling=scaling,
        comparison=comparison,
    )


def require_gate(failures: Sequence[str], artifact: str) -> None:
    """Raise `GateError` unless there are no failures."""
    if failures:
        raise GateError(
            f"{artifact} does not pass the gate: {'; '.join(failures)}; calibrate with more images or another"
            " calibrator, or keep a higher precision"
        )
