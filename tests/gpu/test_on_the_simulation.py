"""The device tests themselves, on the simulated device: they cannot be wrong only where nobody sees it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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
    assert {name for name, outcome in report["outcomes"].items() if not outcome.startswith("passed")} <= {
        "test_against_trtexec",  # not installed here
        "test_int8_against_fp16",  # while the tiny models are FP32
    }
    assert report["figures"]["test_no_leak_over_10000_runs"]["GPU bytes"] == 0


def test_without_a_gpu_they_are_skipped_with_the_reason(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(ROOT / "tests" / "gpu")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" not in done.stdout
    assert "edgefg doctor" in done.stdout
    assert not (tmp_path / "gpu-report.json").exists()
