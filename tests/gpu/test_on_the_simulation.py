"""The device tests themselves, on the simulated device: they cannot be wrong only where nobody sees it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgefg import Classifier
from edgefg.export.onnx.check import check
from tests.conftest import TINY
from tests.gpu.trend import leaks
from tests.simulated.books import VARIABLE, describe_config
from tests.simulated.install import ROOT, SITE


def test_the_device_tests_pass_and_write_their_report(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        VARIABLE: describe_config(),
        "PYTHONPATH": os.pathsep.join([str(SITE), str(ROOT)]),
        "EDGEFG_CACHE": str(tmp_path / "cache"),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(ROOT / "tests" / "gpu")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    report = json.loads((tmp_path / "gpu-report.json").read_text())
    assert report["figures"]["device"]["gpu"] == "Simulated Orin"
    assert report["outcomes"]["test_build"] == "passed"
    failed = {name for name, outcome in report["outcomes"].items() if not outcome.startswith("passed")}
    assert failed <= {"test_against_trtexec"}, "it is not installed here"
    figures = report["figures"]
    assert set(figures["test_parity_with_the_onnx"]) == {"fp32", "fp16", "int8", "fp32, free batch"}
    assert set(figures["test_int8_against_fp16"]["p50 ms"]) == {"fp16", "int8"}
    assert len(set(figures["test_no_leak_over_10000_runs"]["GPU bytes"])) == 1
    assert not (tmp_path / "cache").exists(), "the user's cache stays as it is"


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([0, 30, 10, 60, 20, 90], False),  # a Jetson's other programs
        ([0, 90, 90, 90, 90, 90], False),
        ([0, 1, 2, 3, 4, 5], False),  # too little to matter
        ([0, 8, 16, 24, 32, 40], True),
    ],
)
def test_a_leak_is_a_trend(found: list[int], said: bool) -> None:
    assert leaks(found, 20) == said


def test_the_tiny_models_are_what_users_export() -> None:
    for name in ("onnx-int8", "onnx-fp16"):
        model = TINY / name / "model.onnx"
        assert check(model).broken == ()
        assert sum(file.stat().st_size for file in model.parent.iterdir()) < 150_000
        with Classifier(model, threads=1, verify=True) as classifier:
            assert f"onnx-{classifier.manifest.precision}" == name
    assert check(TINY / "onnx-int8" / "model.onnx").quantised == 10


def test_without_a_gpu_they_are_skipped_with_the_reason(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(ROOT / "tests" / "gpu")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" not in done.stdout
    assert "edgefg doctor" in done.stdout
    assert not (tmp_path / "gpu-report.json").exists()
