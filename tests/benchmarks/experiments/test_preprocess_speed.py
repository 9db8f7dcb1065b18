from __future__ import annotations

import sys
from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest

from edgefg.benchmarks.experiments import preprocess_speed as speed


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for i in range(3):
        noise = generator.integers(0, 256, (200 + 40 * i, 240, 3), np.uint8)
        cv2.imwrite(str(tmp_path / f"{i}.png"), cv2.GaussianBlur(noise, (5, 5), 0))
    return tmp_path


@pytest.mark.parametrize("kind", ["mosaic", "enlarged"])
def test_frames_are_full_camera_frames(photographs: Path, kind: str) -> None:
    frames = speed.make_frames(photographs, kind, 2)
    assert [frame.shape for frame in frames] == [(720, 1280, 3)] * 2
    assert all(frame[-1].any() and frame[:, -1].any() for frame in frames)
    assert not np.array_equal(frames[0], frames[1])


def test_every_candidate_shows_the_same_picture(photographs: Path) -> None:
    threads = cv2.getNumThreads()
    result = speed.measure_speed(speed.make_frames(photographs, "mosaic", 1), "mosaic", repeats=1)
    errors = {candidate.name: candidate.mean_error for candidate in result.candidates}
    assert errors["Pillow bilinear, antialiased"] == 0
    # A swapped channel or a shifted crop would be off by some 20 levels.
    assert all(error < 8 for name, error in errors.items() if name != "crop, linear")
    assert errors["edgefg.preprocess (crop, resize)"] == errors["edgefg.preprocess.prepare (all of it)"]
    assert errors["edgefg.preprocess (crop, resize)"] < errors["crop, area"] < errors["crop, linear"]
    assert cv2.getNumThreads() == threads


def test_prints_a_table_then_json(
    photographs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["preprocess_speed", str(photographs), "--images", "1", "--threads", "1"])
    speed.main()
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(speed.CANDIDATES)
    assert msgspec.json.decode(last, type=speed.PreprocessSpeed).images == 1
