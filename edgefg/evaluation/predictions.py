"""Models over image files: logits of every image, and their accuracy.

Class folders are matched with the manifest's labels by name, never by position: a split may lack classes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from edgefg import metrics
from edgefg.artifact.golden import FloatArray
from edgefg.classifier import Classifier
from edgefg.data import load_split
from edgefg.data.checks import corrupt_message
from edgefg.data.split import Sample
from edgefg.errors import DataError
from edgefg.image_io import read_image
from edgefg.metrics import softmax
from edgefg.preprocess import UInt8Array
from edgefg.progress import track
from edgefg.taxonomy import TaxonomyLevel

LogitsFunction = Callable[[list[UInt8Array]], FloatArray]
"""A model: frames, each ``uint8 [H, W, 3]`` BGR, to logits, ``float32 [N, classes]``."""
_BATCH = 16
_READERS = 2


class FileLogits(NamedTuple):
    """Logits of image files."""

    logits: list[FloatArray]
    """``float32 [N, classes]`` of each model."""
    kept: list[int]
    """The positions of the N readable images among the files."""
    skipped: tuple[str, ...]
    """One line for each unreadable image."""


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """Accuracy and calibration of an artifact on a split."""

    data: str
    split: str
    """``train``, ``val``, ``test``, or ``all`` for data without split folders."""
    scores: metrics.Scores
    skipped: tuple[str, ...]
    """One line for each image that was left out as unreadable."""


class Predictions(NamedTuple):
    """Logits of a model, artifact or checkpoint, on labelled images."""

    model: str
    split: str
    """``train``, ``val``, ``test``, or ``all`` for data without split folders."""
    samples: tuple[Sample, ...]
    """The images with their class indices, one for each row of ``logits``."""
    logits: FloatArray
    """``float32 [N, classes]``."""
    labels: tuple[str, ...]
    """The class names, in the order of the logits."""
    taxonomy: tuple[TaxonomyLevel, ...] = ()
    temperature: float = 1.0
    """Divides the logits before softmax."""
    skipped: tuple[str, ...] = ()
    """One line for each image that was left out as unreadable."""

    @property
    def targets(self) -> npt.NDArray[np.int64]:
        """The class indices of the images, ``int64 [N]``."""
        return np.array([sample.label for sample in self.samples], np.int64)

    @property
    def predicted(self) -> npt.NDArray[np.int64]:
        """The most probable class of each image, ``int64 [N]``."""
        predicted: npt.NDArray[np.int64] = self.logits.argmax(axis=1)
        return predicted

    @property
    def probabilities(self) -> npt.NDArray[np.float32]:
        """Softmax after temperature, ``float32 [N, classes]``."""
        return softmax(self.logits, self.temperature)


def artifact_logits(classifier: Classifier) -> LogitsFunction:
    """Return an artifact's logits as a function of frames."""
    return lambda frames: np.stack([prediction.logits for prediction in classifier.predict_batch(frames)])


def predict_files(models: Sequence[LogitsFunction], files: Sequence[Path], *, skip_corrupt: bool = False) -> FileLogits:
    """Run one or more models over image files; every image is decoded once.

    Args:
        models: the models.
        files: images, at least one.
        skip_corrupt: leave unreadable images out instead of raising.

    Raises:
        DataError: an image cannot be read and ``skip_corrupt`` is not set, or no image can.
        InferenceError: an engine failed, or gave logits that are not finite.
    """
    rows: list[list[FloatArray]] = [[] for _ in models]
    kept: list[int] = []
    problems: list[str] = []
    positions = iter(track(range(len(files)), "classifying images", len(files)))
    with ThreadPoolExecutor(_READERS) as pool:
        while batch := list(itertools.islice(positions, _BATCH)):
            frames = []
            for position, frame in zip(batch, pool.map(_read, [files[i] for i in batch]), strict=True):
                if isinstance(frame, DataError):
                    problems.append(str(frame))
                else:
                    frames.append(frame)
                    kept.append(position)
            if frames:
                for row, model in zip(rows, models, strict=True):
                    row.append(model(frames))
    if problems and not (skip_corrupt and kept):
        raise DataError(corrupt_message(problems, len(files)))
    return FileLogits([np.concatenate(row) for row in rows], kept, tuple(problems))


def _read(path: Path) -> UInt8Array | DataError:
    try:
        return read_image(path)
    except DataError as exc:
        return exc


def predict_split(
    classifier: Classifier, data: Path, split: str | None = None, *, skip_corrupt: bool = False
) -> Predictions:
    """Classify every image of a split.

    Args:
        classifier: the artifact to run.
        data: ``DATA/<split>/<class>/*.jpg``, or ``DATA/<class>/*.jpg``.
        split: None takes ``test``, or ``val`` if there is no ``test``. Data without split folders are split as for
            training if the manifest says how, else taken whole.
        skip_corrupt: leave unreadable images out instead of raising; `Predictions.skipped` names those of the split.

    Raises:
        DataError: the split is missing, a class folder is not among the manifest's labels or holds no image, an image
            cannot be read, or data that are split here are not those that the artifact was trained on.
        InferenceError: the network gives logits that are not finite.
    """
    manifest = classifier.manifest
    origin = manifest.provenance
    name, images = load_split(
        data, split, classifier.labels, origin.split, trained_on=origin.dataset, skip_corrupt=skip_corrupt
    )
    found = predict_files([artifact_logits(classifier)], [image.path for image in images], skip_corrupt=skip_corrupt)
    return Predictions(
        model=str(classifier.path),
        split=name,
        samples=tuple(images[i] for i in found.kept),
        logits=found.logits[0],
        labels=classifier.labels,
        taxonomy=manifest.taxonomy,
        temperature=manifest.output.temperature,
        skipped=found.skipped,
    )


def evaluate(classifier: Classifier, data: Path, split: str | None = None, *, skip_corrupt: bool = False) -> Evaluation:
    """Classify every image of a split and score the logits with the manifest's temperature; see `predict_split`."""
    found = predict_split(classifier, data, split, skip_corrupt=skip_corrupt)
    scores = metrics.score(found.logits, found.targets, len(found.labels), found.temperature)
    return Evaluation(data=str(data), split=found.split, scores=scores, skipped=found.skipped)
