"""`edgefg predict`, `verify`, `inspect` and `doctor`."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from edgefg.artifact.manifest import Manifest, read_manifest
from edgefg.doctor import Report
from tests.conftest import BLOCKER, Run, Tiny


@pytest.mark.parametrize("kind", ["ir", "onnx", "null"])
def test_predict(run: Run, tiny: Tiny, birds: Path, image: Path, kind: str) -> None:
    status, out, err = run("predict", tiny(kind), image, "--json")
    assert (status, err) == (0, "")
    answer = json.loads(out)
    assert answer["label"] == answer["top_k"][0]["label"]
    assert len(answer["top_k"]) == 3
    assert set(answer["timings"]) == {"preprocess", "infer", "decide"}
    status, out, _ = run("predict", tiny(kind), birds / "test", "--top-k", 1)
    assert status == 0
    assert len(out.splitlines()) == len(list((birds / "test").rglob("*.*g")))
    assert answer["label"] in out.splitlines()[0]


def test_predict_goes_on_after_an_unreadable_image(run: Run, tiny: Tiny, image: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"\xff\xd8")
    status, out, err = run("predict", tiny("onnx"), bad, image, "--json")
    assert status == 2
    lines = [json.loads(line) for line in out.splitlines()]
    assert "cut off" in lines[0]["error"]
    assert lines[1]["label"]
    assert err.count("\n") == 1


def test_predict_runs_where_importing_torch_raises(tiny: Tiny, image: Path) -> None:
    code = BLOCKER.replace("BLOCKED", "{'torch', 'onnx', 'timm', 'tqdm', 'nncf'}")
    code += "from edgefg.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "predict", str(tiny("ir")), str(image)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "%" in done.stdout


def test_verify_and_inspect(run: Run, tiny: Tiny) -> None:
    status, out, _ = run("verify", tiny("ir"), "--json")
    assert status == 0
    assert json.loads(out)["golden"]["input_levels"] <= 1
    status, out, _ = run("verify", tiny("ir"))
    assert status == 0
    status, out, _ = run("inspect", tiny("ir"), "--json")
    assert status == 0
    assert json.loads(out)["model"] == "model.xml"
    status, out, _ = run("inspect", tiny("ir"))
    assert "precision: fp32" in out


def test_inspect_shows_the_stages_of_a_later_version(run: Run, tiny: Tiny, rewrite: Callable[..., Manifest]) -> None:
    model = tiny("ir")
    provenance = read_manifest(model).provenance
    rewrite(model, provenance=msgspec.structs.replace(provenance, stages=({"kind": "rotate", "angle": 3},)))
    status, out, _ = run("inspect", model)
    assert status == 0
    assert "'angle': 3" in out


def test_doctor_on_this_machine(run: Run) -> None:
    status, out, err = run("doctor", "--json")
    assert (status, err) == (0, "")
    report = msgspec.json.decode(out, type=Report)
    assert report.packages["core"]["numpy"] == importlib.metadata.version("numpy")
    assert "dev" not in report.packages
    assert json.loads(out)["cpus"] >= 1
    status, out, _ = run("doctor")
    assert status == 0
    assert out.startswith(f"edgefg {report.edgefg}, Python ")


def test_doctor_works_without_what_its_extra_brings() -> None:
    code = BLOCKER.replace("BLOCKED", "{'packaging', 'psutil', 'jinja2'}") + "from edgefg.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "doctor"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "to do: packaging is not installed" in done.stdout
