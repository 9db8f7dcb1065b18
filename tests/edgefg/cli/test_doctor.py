"""The verb doctor, on this machine."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys

import msgspec

from edgefg.doctor import Report
from tests.conftest import BLOCKER, Run


def test_the_verb_on_this_machine(run: Run) -> None:
    status, out, err = run("doctor", "--json")
    assert (status, err) == (0, "")
    report = msgspec.json.decode(out, type=Report)
    assert report.packages["core"]["numpy"] == importlib.metadata.version("numpy")
    assert "dev" not in report.packages
    assert json.loads(out)["cpus"] >= 1
    status, out, _ = run("doctor")
    assert status == 0
    assert out.startswith(f"edgefg {report.edgefg}, Python ")


def test_it_works_without_what_its_extra_brings() -> None:
    code = BLOCKER.replace("BLOCKED", "{'packaging', 'psutil', 'jinja2'}") + "from edgefg.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "doctor"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "to do: packaging is not installed" in done.stdout
