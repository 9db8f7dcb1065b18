"""Run an artifact over labelled images, beside its parent, for the figures that its manifest keeps.

Runs on devices: the parent is any function of frames, so no torch is needed here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from edgefg.artifact.golden import FloatArray
from edgefg.artifact.manifest import Accuracy, Comparison, TemperatureScaling
from edgefg.classifier import Classifier
from edgefg.errors import GateError
from edgefg.evaluation.gate import compare
from edgefg.evaluation.temperature import scale_temperature
from edgefg.image_io import read_image
from edgefg.metrics import score
from edgefg.preprocess import UInt8Array
from edgefg.settings.gate import Gate

Answer = Callable[[list[UInt8Array]], FloatArray]
"""Frames, each ``uint8 [H, W, 3]`` BGR, to logits, ``float32 [N, classes]``."""
_AT_ONCE = 16


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured of an artifact before it got its name."""

    accuracy: Accuracy
    temperature: float = 1.0
    scaling: TemperatureScaling | None = None
    """How the temperature was found; None where none was fitted."""
    comparison: Comparison | None = None
    """With its parent, where there was one."""


def answer_of(classifier: Classifier) -> Answer:
    """Return what gives an artifact's logits of frames."""
    return lambda frames: np.stack([prediction.logits for prediction in classifier.predict_batch(frames)])


def run(
    answers: Sequence[Answer], files: Sequence[Path], progress: Callable[[int, int], None] | None = None
) -> list[FloatArray]:
    """Return the logits of each of ``answers``, ``float32 [N, classes]``; every image is decoded once.

    Args:
        answers: who is asked.
        files: images, at least one.
        progress: called with how many images are done, and of how many.

    Raises:
        DataError: an image cannot be read.
        InferenceError: an engine failed, or gave logits that are not finite.
    """
    rows: list[list[FloatArray]] = [[] for _ in answers]
    for first in range(0, len(files), _AT_ONCE):
        frames = [read_image(path) for path in files[first : first + _AT_ONCE]]
        for row, answer in zip(rows, answers, strict=True):
            row.append(answer(frames))
        if progress is not None:
            progress(min(first + _AT_ONCE, len(files)), len(files))
    return [np.concatenate(row) for row in rows]


def measure(
    classifier: Classifier,
    samples: Sequence[tuple[Path, int]],
    data: str,
    *,
    parent: Answer | None = None,
    gate: Gate | None = None,
    fit_temperature: bool = True,
) -> Measured:
    """Measure a fresh artifact: accuracy, temperature, and what it lost against its parent.

    Args:
        classifier: the artifact.
        samples: labelled images (path, class index), at least one.
        data: names them in the results.
        parent: what gives the parent's logits of the same frames.
        gate: the limits against the parent; None only measures.
        fit_temperature: whether to fit the temperature to these images.

    Raises:
        GateError: a limit does not hold; the message names the classes.
        ParityError: the parent gave a logit that is not finite.
        DataError, InferenceError: see `run`.
    """
    answers = [answer_of(classifier)] if parent is None else [answer_of(classifier), parent]
    logits, *others = run(answers, [path for path, _ in samples])
    labels: npt.NDArray[np.int64] = np.array([label for _, label in samples], np.int64)
    comparison = None
    for before in others:
        comparison, failures = compare(logits, before, labels, classifier.labels, data, gate)
        require(failures, "the artifact")
    temperature, scaling = scale_temperature(logits, labels, data) if fit_temperature else (1.0, None)
    return Measured(
        accuracy=Accuracy.of(score(logits, labels, len(classifier.labels)), data),
        temperature=temperature,
        scaling=scaling,
        comparison=comparison,
    )


def require(failures: Sequence[str], artifact: str) -> None:
    """Raise `GateError` unless there are no failures."""
    if failures:
        raise GateError(
            f"{artifact} does not pass the gate: {'; '.join(failures)}; calibrate with more images or another"
            " calibrator, or keep a higher precision"
        )
