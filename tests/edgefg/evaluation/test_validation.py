"""Validation of a fresh artifact: its figures, its parent's, the gate and the temperature."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from edgefg import Classifier
from edgefg.errors import GateError
from edgefg.evaluation.predictions import artifact_logits
from edgefg.evaluation.validation import require_gate, validate
from edgefg.image_io import read_image
from edgefg.preprocess import UInt8Array
from edgefg.settings.gate import Gate

Birds = tuple[tuple[str, ...], list[UInt8Array]]


@pytest.fixture
def samples(birds: Birds, tmp_path: Path) -> list[tuple[Path, int]]:
    """Photographs of birds, each twice, so that a temperature can be fitted."""
    labels, frames = birds
    classes = sorted(set(labels))
    found = []
    for i, (label, frame) in enumerate(zip(labels * 2, frames * 2, strict=True)):
        cv2.imwrite(str(tmp_path / f"{i}.png"), frame)
        found.append((tmp_path / f"{i}.png", classes.index(label)))
    return found


def test_figures_against_a_parent_of_the_same_network(
    tiny: Callable[[str], Path], samples: list[tuple[Path, int]]
) -> None:
    with Classifier(tiny("onnx")) as classifier, Classifier(tiny("ir")) as parent:
        found = validate(classifier, samples, "val of birds", parent=artifact_logits(parent), gate=Gate(max_drop=0))
        hits = [classifier.predict(read_image(path)).index == label for path, label in samples]
    assert found.accuracy.images == 32
    assert found.accuracy.top1 == pytest.approx(np.mean(hits))
    assert found.comparison is not None
    assert (found.comparison.lost, found.comparison.gained, found.comparison.agreement) == (0, 0, 1)
    assert found.scaling is not None
    assert found.scaling.data == "val of birds"
    assert found.temperature > 0


def test_without_parent_and_temperature(tiny: Callable[[str], Path], samples: list[tuple[Path, int]]) -> None:
    with Classifier(tiny("onnx")) as classifier:
        found = validate(classifier, samples, "val", fit_temperature=False)
    assert (found.comparison, found.scaling, found.temperature) == (None, None, 1.0)


def test_an_artifact_worse_than_its_parent(tiny: Callable[[str], Path], samples: list[tuple[Path, int]]) -> None:
    truth = iter(np.array([label for _, label in samples]))

    def parent(frames: list[UInt8Array]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return 9 * np.eye(4, dtype=np.float32)[[next(truth) for _ in frames]]

    with Classifier(tiny("null")) as classifier, pytest.raises(GateError, match="the artifact does not pass the gate"):
        validate(classifier, samples, "val", parent=parent, gate=Gate())


def test_a_gate_without_failures_passes() -> None:
    require_gate((), "model.xml")
    with pytest.raises(GateError, match=r"^model\.xml does not pass the gate: first; second; calibrate"):
        require_gate(("first", "second"), "model.xml")
