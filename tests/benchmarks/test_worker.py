"""A round of the worker, in this process."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from edgefg import Classifier
from edgefg.benchmarks.worker import CAMERA, Round, _limited, frame_size, run_round
from edgefg.preprocess import InputSpec, UInt8Array
from tests.benchmarks.conftest import MakeArtifact

_TURN = Round(iterations=3, warmup=1, seconds=None, workers=1)


def _frame() -> UInt8Array:
    return np.zeros((16, 16, 3), np.uint8)


def test_a_round_ends_when_its_time_is_over(null_artifact: MakeArtifact) -> None:
    with Classifier(null_artifact()) as classifier:
        frames = [_frame()]
        over = run_round(classifier, frames, msgspec.structs.replace(_TURN, iterations=10_000, seconds=1e-9))
        whole = run_round(classifier, frames, _TURN)
    assert len(over.total) == 1
    assert len(whole.total) == len(whole.infer) == 3
    assert all(total >= sum(stages) for total, *stages in zip(whole.total, whole.preprocess, whole.infer, strict=True))


def test_several_threads_are_measured_in_addition(null_artifact: MakeArtifact) -> None:
    with Classifier(null_artifact()) as classifier:
        found = run_round(classifier, [_frame()], msgspec.structs.replace(_TURN, workers=2))
        alone = run_round(classifier, [_frame()], _TURN)
    assert len(found.total) == 3
    assert found.concurrent_per_second is not None
    assert found.concurrent_per_second > 0
    assert alone.concurrent_per_second is None


def test_frames_are_taken_one_after_the_other(null_artifact: MakeArtifact, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    with Classifier(null_artifact()) as classifier:
        predict = classifier.predict

        def note(frame: UInt8Array) -> object:
            seen.append(int(frame[0, 0, 0]))
            return predict(frame)

        monkeypatch.setattr(classifier, "predict", note)
        run_round(classifier, [_frame(), _frame() + np.uint8(1)], _TURN)
    assert seen == [0, 1, 0, 1]


def test_the_size_of_the_frames() -> None:
    spec = InputSpec(height=32, width=48)
    assert frame_size("network", spec) == (32, 48)
    assert frame_size("camera", spec) == CAMERA == (720, 1280)


def test_the_time_ends_a_count_after_the_first() -> None:
    assert list(_limited(4, None)) == [0, 1, 2, 3]
    assert list(_limited(4, 0.0)) == [0]
    assert list(_limited(0, 0.0)) == []
