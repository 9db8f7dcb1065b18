"""Prove an artifact: files, manifest and golden set; with data, its accuracy against its parent's on the same images.

    edgefg verify runs/x/openvino-int8/model.xml --parent runs/x/openvino-fp32/model.xml --data DATA

Runs on devices: no torch, everything goes through `Classifier`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from edgefg import golden
from edgefg.classifier import Classifier
from edgefg.errors import DataError, ParityError
from edgefg.folders import read_split
from edgefg.golden import FloatArray, GoldenReport
from edgefg.manifest import Accuracy
from edgefg.metrics import balanced_accuracy, per_class_recall, wilson_interval
from edgefg.sources import read_image
from edgefg.split import Sample

IntArray = npt.NDArray[np.int64]
_WORST = 5
_AT_ONCE = 16


class ClassDrop(msgspec.Struct, frozen=True):
    """A class that the artifact recognises less often than its parent."""

    label: str
    images: int
    parent_recall: float
    recall: float


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """An artifact and its parent on the same images."""

    parent: Accuracy
    drop: float
    """Top-1 of the parent minus top-1 of the artifact, in percentage points."""
    agreement: float
    """Share of images on which both name the same class."""
    logits: float
    """Greatest absolute difference of a logit."""
    parent_logits_max: float
    """Greatest absolute logit of the parent, to compare with."""
    worst: tuple[ClassDrop, ...]
    """The classes that lose most, worst first; at most five."""


class VerifyReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `verify` found; everything in it holds, or `verify` would have raised."""

    artifact: str
    runtime: str
    """Name and version of the engine that ran it here."""
    files: int
    """How many files have the recorded size and SHA-256."""
    golden: GoldenReport
    accuracy: Accuracy | None = None
    comparison: Comparison | None = None

    def render(self) -> str:
        """Return the report as a few lines of text for people."""
        lines = [
            f"{self.artifact}: {self.files} files as recorded, on {self.runtime}",
            f"golden set: {self.golden.frames} frames; input within {self.golden.input_levels} levels, logits within"
            f" {self.golden.logits:.3g} of its own and {self.golden.parent_logits:.3g} of the parent's",
        ]
        if self.accuracy:
            lines.append(f"top-1 on {_figures(self.accuracy)}")
        if self.comparison:
            found = self.comparison
            lines += [
                f"parent on {_figures(found.parent)}",
                f"drop {found.drop:+.2f} points, top-1 agreement {found.agreement:.2%}, greatest difference of a logit"
                f" {found.logits:.3g} (parent's greatest logit: {found.parent_logits_max:.3g})",
            ]
            lines += [
                f"  {worst.label}: recall {worst.parent_recall:.1%} → {worst.recall:.1%} of {worst.images} images"
                for worst in found.worst
            ]
        return "\n".join(lines)


def verify(
    artifact: Path,
    *,
    parent: Path | None = None,
    data: Path | Sequence[Sample] | None = None,
    split: str | None = None,
    max_drop: float = 1.0,
    min_agreement: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Prove an artifact on this device.

    Args:
        artifact: its model file.
        parent: model file of the artifact to compare with, for instance the FP32 one. Needs ``data``.
        data: folder of labelled images, see `edgefg.folders.read_split`; or the samples (path, class index) themselves.
        split: which split of ``data``; None takes ``val``. Names samples in the report.
        max_drop: greatest loss of top-1 against the parent, percentage points.
        min_agreement: least share of images on which both name the same class, in [0, 1].
        progress: called with how many images are done, and of how many.

    Raises:
        ManifestError, IntegrityError, RuntimeUnavailableError: the artifact or its parent cannot be trusted or run.
        DataError: the data are missing, or their classes are not the artifact's.
        ParityError: the golden set or the comparison does not hold; the message says by how much.
    """
    if parent is not None and data is None:
        raise DataError("a parent was given without data; needed a folder of labelled images to compare on")
    with Classifier(artifact) as classifier:
        checked = golden.check(classifier)
        accuracy, comparison = None, None
        if data is not None:
            if isinstance(data, Path):
                origin = classifier.manifest.provenance
                # Training may have left unreadable images out; the fingerprint proves that the same ones are out here.
                part, samples = read_split(
                    *(data, split, classifier.labels, origin.split),
                    prefer=("val",),
                    trained_on=origin.dataset,
                    skip_corrupt=origin.dataset is not None,
                )
                name = f"{part} of {data.resolve().name}"
            else:
                samples, name = tuple(data), split or "given images"
            labels = np.array([label for _, label in samples], np.int64)
            files = [path for path, _ in samples]
            if parent is None:
                (logits,) = _run([classifier], files, progress)
            else:
                with Classifier(parent) as other:
                    _check_labels(classifier, other)
                    logits, before = _run([classifier, other], files, progress)
                comparison = _compare(logits, before, labels, classifier.labels, name)
            accuracy = _accuracy(logits, labels, classifier.labels, name)
        runtime, count = classifier.runtime_version, len(classifier.manifest.files)
    report = VerifyReport(
        artifact=str(artifact), runtime=runtime, files=count, golden=checked, accuracy=accuracy, comparison=comparison
    )
    if comparison is not None:
        _gate(comparison, max_drop, min_agreement)
    return report


def measure(classifier: Classifier, samples: Sequence[tuple[Path, int]], data: str) -> Accuracy:
    """Measure an artifact's accuracy on labelled images (path, class index); ``data`` names them in the result."""
    (logits,) = _run([classifier], [path for path, _ in samples], None)
    labels = np.array([label for _, label in samples], np.int64)
    return _accuracy(logits, labels, classifier.labels, data)


def _run(
    classifiers: list[Classifier], files: list[Path], progress: Callable[[int, int], None] | None
) -> list[FloatArray]:
    """Return each classifier's logits, ``float32 [N, classes]``; every image is decoded once."""
    rows: list[list[npt.NDArray[np.float32]]] = [[] for _ in classifiers]
    for first in range(0, len(files), _AT_ONCE):
        frames = [read_image(path) for path in files[first : first + _AT_ONCE]]
        for row, classifier in zip(rows, classifiers, strict=True):
            row += [prediction.logits for prediction in classifier.predict_batch(frames)]
        if progress is not None:
            progress(min(first + _AT_ONCE, len(files)), len(files))
    return [np.stack(row) for row in rows]


def _check_labels(artifact: Classifier, parent: Classifier) -> None:
    if artifact.labels != parent.labels:
        raise DataError(
            f"{artifact.path} has {len(artifact.labels)} classes and {parent.path} {len(parent.labels)}, or others;"
            " needed artifacts of the same classes in the same order"
        )


def _accuracy(logits: FloatArray, labels: IntArray, names: tuple[str, ...], data: str) -> Accuracy:
    predicted = logits.argmax(axis=1)
    correct = int((predicted == labels).sum())
    low, high = wilson_interval(correct, len(labels))
    return Accuracy(
        data=data,
        images=len(labels),
        top1=correct / len(labels),
        top1_low=low,
        top1_high=high,
        balanced=balanced_accuracy(predicted, labels, len(names)),
    )


def _compare(logits: FloatArray, before: FloatArray, labels: IntArray, names: tuple[str, ...], data: str) -> Comparison:
    found, expected = logits.argmax(axis=1), before.argmax(axis=1)
    recall, parent_recall = (per_class_recall(predicted, labels, len(names)) for predicted in (found, expected))
    counts = np.bincount(labels, minlength=len(names))
    lost = np.nan_to_num((parent_recall - recall) * counts)
    # By images lost, not by share: one image of a class of two is no finding.
    order = [int(i) for i in np.argsort(-lost, kind="stable")[:_WORST] if lost[i] > 0]
    return Comparison(
        parent=_accuracy(before, labels, names, data),
        drop=100 * float((expected == labels).mean() - (found == labels).mean()),
        agreement=float((found == expected).mean()),
        logits=float(np.abs(logits - before).max()),
        parent_logits_max=float(np.abs(before).max()),
        worst=tuple(ClassDrop(names[i], int(counts[i]), float(parent_recall[i]), float(recall[i])) for i in order),
    )


def _gate(found: Comparison, max_drop: float, min_agreement: float) -> None:
    """Raise `ParityError` where the comparison does not hold; a NaN fails."""
    worst = f"; worst class: {found.worst[0].label}" if found.worst else ""
    if not np.isfinite(found.logits):
        raise ParityError("a logit is not finite; export the artifact again")
    if not found.drop <= max_drop:
        raise ParityError(
            f"top-1 drops by {found.drop:.2f} points against the parent on {found.parent.data}"
            f" ({found.parent.images} images), allowed are {max_drop:g}{worst};"
            " calibrate with more images, or keep a higher precision"
        )
    if not found.agreement >= min_agreement:
        raise ParityError(
            f"artifact and parent agree on {found.agreement:.2%} of {found.parent.images} images, needed are"
            f" {min_agreement:.2%}{worst}; calibrate with more images, or keep a higher precision"
        )


def _figures(accuracy: Accuracy) -> str:
    return (
        f"{accuracy.data}: {accuracy.top1:.2%} (95 %: {accuracy.top1_low:.2%} to {accuracy.top1_high:.2%},"
        f" {accuracy.images} images), balanced {accuracy.balanced:.2%}"
    )
