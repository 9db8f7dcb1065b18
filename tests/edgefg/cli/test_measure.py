"""`edgefg evaluate`, `edgefg explain` and `edgefg bench`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from edgefg.data import load_dataset
from edgefg.preprocess import InputSpec
from edgefg.settings.split import SplitSpec
from edgefg.training.checkpoint import SCHEMA, Header, save
from edgefg.training.models.backbone import build_backbone
from edgefg.training.models.network import Network
from tests.conftest import BLOCKER, Run, Tiny

_LEVELS = (127.0, 127.0, 127.0)


@pytest.fixture(scope="module")
def checkpoint(birds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained network of the birds' classes."""
    torch.manual_seed(0)
    data = load_dataset(birds)
    network = Network(build_backbone("test_efficientnet", 4), _LEVELS, _LEVELS).eval()
    header = Header(
        schema=SCHEMA,
        kind="student",
        method="plain",
        backbone="test_efficientnet",
        labels=data.labels,
        input=InputSpec(height=32, width=32),
        mean=_LEVELS,
        std=_LEVELS,
        dataset=data.fingerprint,
        split=SplitSpec(),
        edgefg="0",
    )
    path = tmp_path_factory.mktemp("checkpoint") / "student.safetensors"
    save(path, network, header)
    return path


@pytest.fixture(scope="module")
def blanks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blanks")
    for i in range(3):
        cv2.imwrite(str(folder / f"{i}.png"), np.full((40, 50, 3), 60 * i, np.uint8))
    return folder


def test_everything_of_an_artifact(run: Run, tiny: Tiny, birds: Path, blanks: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    status, out, err = run(
        *("evaluate", tiny("onnx"), birds, "--against", tiny("ir"), "--unknown", blanks, "--report", page, "--json"),
        *("--positive", "bar", "--positive", "cross"),
    )
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["split"] == "test"
    assert found["against"]["model"].endswith("model.xml")
    # Two engines of the same network.
    assert (found["against"]["gained"], found["against"]["lost"], found["against"]["mcnemar_p"]) == (0, 0, 1.0)
    assert found["positive"]["classes"] == ["bar", "cross"]
    assert found["unknown"]["images"] == 3
    assert found["taxonomy"][0]["accuracy"]["value"] >= found["top1"]
    assert {entry["train_images"] for entry in found["classes"]} == {5}
    assert sum(entry["images"] for entry in found["classes"]) == found["images"]
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_an_artifact_against_a_checkpoint(run: Run, tiny: Tiny, birds: Path, checkpoint: Path, blanks: Path) -> None:
    views = ("--positive", "bar", "--unknown", blanks, "--split", "val")
    status, out, err = run("evaluate", tiny("onnx"), birds, "--against", checkpoint, *views)
    assert (status, err) == (0, "")
    for part in ("rarest classes", "McNemar p", "ROC AUC", "3 images in"):
        assert part in out
    status, back, _ = run("evaluate", checkpoint, birds, "--against", tiny("onnx"), *views, "--json")
    assert status == 0
    found = json.loads(back)
    assert f"{found['against']['gained']} images lost, {found['against']['lost']} gained" in out


def test_data_without_a_test_split_are_measured_on_val(
    run: Run, tiny: Tiny, birds: Path, checkpoint: Path, tmp_path: Path
) -> None:
    for split in ("train", "val"):
        (tmp_path / split).symlink_to(birds / split)
    for model in (tiny("onnx"), checkpoint):
        status, out, _ = run("evaluate", model, tmp_path, "--json")
        assert status == 0
        assert json.loads(out)["split"] == "val"


def test_an_unreadable_unknown_image(run: Run, tiny: Tiny, birds: Path, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8")
    cv2.imwrite(str(tmp_path / "good.png"), np.zeros((9, 9, 3), np.uint8))
    for model in (tiny("onnx"), checkpoint):
        status, _, err = run("evaluate", model, birds, "--unknown", tmp_path)
        assert status == 2
        assert "1 of 2 images cannot be used" in err
        status, out, err = run("evaluate", model, birds, "--unknown", tmp_path, "--skip-corrupt", "--json")
        assert status == 0
        assert "left out" in err
        assert json.loads(out)["unknown"]["images"] == 1


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_without_matplotlib_all_but_the_page_is_there(package: str, tiny: Tiny, birds: Path, tmp_path: Path) -> None:
    code = BLOCKER.replace("BLOCKED", f"{{'torch', {package!r}}}") + "from edgefg.cli import main; main()"
    command = [sys.executable, "-W", "error", "-c", code, "evaluate", str(tiny("onnx")), str(birds)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "top1" in done.stdout
    page = tmp_path / "page.html"
    done = subprocess.run([*command, "--report", str(page)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        f"edgefg: this command needs {package}, which is not installed: pip install 'edgefg[report]'"
    ]
    assert not page.exists()


def test_explain_goes_on_after_an_unreadable_image(run: Run, birds: Path, checkpoint: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"\xff\xd8")
    good = sorted((birds / "test").rglob("*.*g"))
    status, out, err = run("explain", checkpoint, bad, birds / "test", good[0], "--out", tmp_path / "out", "--top", 2)
    assert status == 2
    assert err.count("\n") == 1
    assert "cut off" in err
    assert len(out.splitlines()) == len(good) == len(list((tmp_path / "out").iterdir()))
    status, out, _ = run("explain", checkpoint, good[0], "--out", tmp_path / "out", "--json")
    assert status == 0
    found = json.loads(out)
    assert len(found["top"]) == 3
    assert Path(found["picture"]).is_file()


def test_an_artifact_by_split(run: Run, tiny: Tiny, birds: Path) -> None:
    status, out, _ = run("evaluate", tiny("onnx"), birds, "--json")
    scores = json.loads(out)
    assert status == 0
    assert scores["split"] == "test"
    assert scores["top1"] > 0.5
    status, out, _ = run("evaluate", tiny("onnx"), birds, "--split", "val")
    assert status == 0
    assert re.search(r"^split +val$", out, flags=re.MULTILINE)


def test_bench_prints_a_table_then_one_json_line(run: Run, tiny: Tiny, tmp_path: Path) -> None:
    status, out, _ = run(
        "bench", tiny("null"), "--iterations", 4, "--rounds", 2, "--warmup", 1, "--out", tmp_path / "r.json"
    )
    assert status == 0
    assert "p99" in out
    assert json.loads(out.splitlines()[-1]) == json.loads((tmp_path / "r.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "{tiny}", "{birds}", "--positive", "albatross"], "--positive albatross: no such class"),
        (["evaluate", "{tiny}", "{birds}", "--unknown", "/no/such"], "/no/such does not exist"),
        (["evaluate", "{tiny}", "{birds}", "--against", "/no/such.onnx"], "neither is such.onnx"),
        (["evaluate", "{checkpoint}", "{birds}", "--split", "holdout"], "no split 'holdout'; choose from train, val"),
        (["explain", "{tiny}", "{birds}", "--out", "{out}"], "is not a checkpoint"),
        (["explain", "{checkpoint}", "/no/such.jpg", "--out", "{out}"], "/no/such.jpg does not exist"),
        (["explain", "/no/such.safetensors", "{birds}", "--out", "{out}"], "does not exist"),
        (["explain", "{checkpoint}", "{birds}", "--out", "{file}"], "cannot write"),
    ],
)
def test_mistakes(
    run: Run, tiny: Tiny, birds: Path, checkpoint: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "file").touch()
    places = {
        "tiny": tiny("onnx"),
        "birds": birds,
        "checkpoint": checkpoint,
        "out": tmp_path / "out",
        "file": tmp_path / "file",
    }
    status, out, err = run(*(argument.format(**places) for argument in arguments))
    assert (status, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert err.count("\n") == 1
