"""The engine that comes with the repository does what its manifest says, and holds no photograph of the data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgefg import Classifier
from edgefg.artifact import golden
from edgefg.artifact.manifest import Manifest, read_manifest
from edgefg.data.calibration import synthetic_frames

FOLDER = Path(__file__).parents[2] / "benchmarks" / "models" / "grocery-int8"
MODEL = FOLDER / "model.xml"


def manifest() -> Manifest:
    return read_manifest(MODEL)


def test_it_is_small_and_in_int8() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 8_000_000
    assert manifest().precision == "int8"
    assert len(manifest().labels) == 81


def test_it_is_made_for_any_cpu() -> None:
    assert manifest().provenance.recipe.endswith("any CPU")


def test_it_reproduces_its_golden_set_here() -> None:
    with Classifier(MODEL, verify=True) as classifier:
        prediction = classifier.predict(np.full((300, 400, 3), 127, np.uint8))
    assert prediction.label in manifest().labels


def test_its_golden_frames_are_generated() -> None:
    frames = golden.read(MODEL.with_suffix(".golden.npz")).frames
    generated = synthetic_frames(manifest().input)
    assert all(any(np.array_equal(frame, one) for one in generated) for frame in frames)


def test_it_says_what_it_was_compared_with_and_how_sure_it_is() -> None:
    described = manifest()
    assert described.accuracy is not None
    assert described.comparison is not None
    assert described.temperature_scaling is not None
