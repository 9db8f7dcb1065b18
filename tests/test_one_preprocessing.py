"""The same image file becomes the same network input in every stage, bit by bit, from the same decoder on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from edgefg import Classifier
from edgefg.artifact import golden
from edgefg.data.calibration import read_calibration
from edgefg.data.split import Sample
from edgefg.image_io import read_image
from edgefg.preprocess import prepare
from edgefg.training.data.augment import EvaluationImages


@pytest.mark.parametrize("size", [(720, 1280), (348, 348), (64, 64), (37, 91)])
def test_training_calibration_golden_set_and_classifier_agree(
    tmp_path: Path, tiny: Callable[[str], Path], size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(7).integers(0, 255, (size[0] // 3 + 1, size[1] // 3 + 1, 3), np.uint8)
    photo = tmp_path / "photo.jpg"
    cv2.imwrite(str(photo), cv2.resize(noise, size[::-1], interpolation=cv2.INTER_CUBIC))
    with Classifier(tiny("onnx")) as classifier:
        spec = classifier.manifest.input
        seen: list[np.ndarray] = []
        infer = classifier._runtime.infer
        monkeypatch.setattr(classifier._runtime, "infer", lambda batch: (seen.append(batch.copy()), infer(batch))[1])
        classifier.predict(read_image(photo))
        classifier.predict_batch([read_image(photo)])
    evaluated = EvaluationImages([Sample(photo, 0)], spec)[0][0].numpy()
    calibrated = read_calibration([photo], spec).inputs[0]
    frame = read_image(photo)
    path = tmp_path / "golden.npz"
    prepared = prepare(frame, spec)[None]
    logits = np.zeros((1, 2), np.float32)
    golden.write(golden.GoldenSet((frame,), prepared, logits, logits), path)
    stored = golden.read(path)
    for other in (seen[1][0], evaluated, calibrated, stored.inputs[0], prepare(stored.frames[0], spec)):
        assert np.array_equal(seen[0][0], other)
