"""Prove an artifact: files, manifest and golden set; with data, its accuracy against its parent's on the same images.

    edgefg verify runs/x/openvino-int8/model.xml --parent runs/x/openvino-fp32/model.xml --data DATA

Runs on devices: no torch, everything goes through `Classifier`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from edgefg.artifact import golden
from edgefg.artifact.golden import FloatArray, GoldenReport
from edgefg.artifact.manifest import Accuracy, Comparison
from edgefg.classifier import Classifier
from edgefg.data import load_split
from edgefg.data.split import Sample
from edgefg.errors import DataError
from edgefg.evaluation.gate import compare
from edgefg.evaluation.predictions import artifact_logits, predict_files
from edgefg.evaluation.validation import require_gate
from edgefg.metrics import score
from edgefg.settings.gate import Gate

IntArray = npt.NDArray[np.int64]
_GATE = Gate()


class VerifyReport(msgspec.Struct, frozen=True, kw_only=True):
    """Result of `verify`: it exists only if files and golden set passed."""

    artifact: str
    runtime: str
    """Name and version of the engine that ran it here."""
    files: int
    """How many files have the recorded size and SHA-256."""
    golden: GoldenReport
    accuracy: Accuracy | None = None
    comparison: Comparison | None = None
    failures: tuple[str, ...] = ()
    """The limits of the gate that do not hold, with the classes concerned; `verify` raises if there is one."""

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
            lines += [f"parent on {_figures(self.comparison.parent)}", self.comparison.render()]
        return "\n".join(lines)


def verify(
    artifact: Path,
    *,
    parent: Path | None = None,
    data: Path | Sequence[Sample] | None = None,
    split: str | None = None,
    gate: Gate = _GATE,
    device: str | None = None,
) -> VerifyReport:
    """Prove an artifact on this device; see `examine`, which reports a failed gate without raising.

    Raises:
        GateError: the artifact is worse than its parent by more than ``gate`` allows; the message names the classes.
        ManifestError, IntegrityError, RuntimeUnavailableError, DataError, ParityError: see `examine`.
    """
    report = examine(artifact, parent=parent, data=data, split=split, gate=gate, device=device)
    require_gate(report.failures, report.artifact)
    return report


def examine(
    artifact: Path,
    *,
    parent: Path | None = None,
    data: Path | Sequence[Sample] | None = None,
    split: str | None = None,
    gate: Gate = _GATE,
    device: str | None = None,
) -> VerifyReport:
    """Check an artifact on this device and, with data, measure it beside its parent.

    Args:
        artifact: its model file.
        parent: model file of the artifact to compare with, for instance the FP32 one. Needs ``data``.
        data: folder of labelled images, see `edgefg.data.load_split`; or the samples (path, class index)
            themselves.
        split: which split of ``data``; None takes ``val``. Names samples in the report.
        gate: how much worse than ``parent`` it may be; the report's ``failures`` names the limits that do not hold.
        device: the engine's, as `Classifier` takes it.

    Raises:
        ManifestError, IntegrityError, RuntimeUnavailableError: the artifact or its parent cannot be trusted or run.
        DataError: the data are missing, or their classes are not the artifact's.
        ParityError: the golden set does not hold; the message says by how much.
    """
    if parent is not None and data is None:
        raise DataError("--parent was given without --data; give a folder of labelled images to compare on")
    with Classifier(artifact, device=device) as classifier:
        checked = golden.check(classifier)
        accuracy, comparison = None, None
        failures: tuple[str, ...] = ()
        if data is not None:
            name, samples = _samples(classifier, data, split)
            logits, *before = _logits(classifier, parent, device, [path for path, _ in samples])
            labels: IntArray = np.array([label for _, label in samples], np.int64)
            accuracy = Accuracy.of(score(logits, labels, len(classifier.labels)), name)
            for expected in before:
                comparison, _, failures = compare(logits, expected, labels, classifier.labels, name, gate)
        return VerifyReport(
            artifact=str(artifact),
            runtime=classifier.runtime_version,
            files=len(classifier.manifest.files),
            golden=checked,
            accuracy=accuracy,
            comparison=comparison,
            failures=failures,
        )


def _samples(classifier: Classifier, data: Path | Sequence[Sample], split: str | None) -> tuple[str, Sequence[Sample]]:
    """Return the name of the labelled images, and the images."""
    if not isinstance(data, Path):
        return split or "given images", data
    origin = classifier.manifest.provenance
    # Training may have left unreadable images out; the fingerprint proves that the same ones are out here.
    part, samples = load_split(
        *(data, split, classifier.labels, origin.split),
        prefer=("val",),
        trained_on=origin.dataset,
        skip_corrupt=origin.dataset is not None,
    )
    return f"{part} of {data.resolve().name}", samples


def _logits(classifier: Classifier, parent: Path | None, device: str | None, files: list[Path]) -> list[FloatArray]:
    """Return the artifact's logits and, if there is a parent, the parent's."""
    if parent is None:
        return predict_files([artifact_logits(classifier)], files).logits
    with Classifier(parent, device=device) as other:
        _check_labels(classifier, other)
        return predict_files([artifact_logits(classifier), artifact_logits(other)], files).logits


def _check_labels(artifact: Classifier, parent: Classifier) -> None:
    if artifact.labels != parent.labels:
        raise DataError(
            f"{artifact.path} ({len(artifact.labels)} classes) and {parent.path} ({len(parent.labels)}) differ in their"
            " classes; compare artifacts with the same classes in the same order"
        )


def _figures(accuracy: Accuracy) -> str:
    return (
        f"{accuracy.data}: {accuracy.top1:.2%} (95 %: {accuracy.top1_low:.2%} to {accuracy.top1_high:.2%},"
        f" {accuracy.images} images), balanced {accuracy.balanced:.2%}"
    )
