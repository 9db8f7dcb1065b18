"""How the command line ends: exit status, one line on standard error, signals and standard output."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run, Tiny


def break_hash(model: Path) -> None:
    data = bytearray(model.with_suffix(".bin").read_bytes())
    data[-1] ^= 1
    model.with_suffix(".bin").write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (break_hash, "SHA-256"),
        (lambda model: model.with_suffix(".bin").unlink(), "is missing"),
        (
            lambda model: model.with_suffix(".json").write_text(model.with_suffix(".json").read_text()[:90]),
            "not a whole",
        ),
        (lambda model: model.with_suffix(".json").unlink(), "copy the manifest"),
        (lambda model: model.with_suffix(".json").write_text('{"schema": 7}'), "has schema 7"),
    ],
)
@pytest.mark.parametrize("verb", ["predict", "verify", "inspect", "bench"])
def test_an_artifact_that_cannot_be_trusted_is_one_line_and_status_2(
    run: Run, tiny: Tiny, image: Path, spoil: Callable[[Path], object], message: str, verb: str
) -> None:
    model = tiny("ir")
    spoil(model)
    status, out, err = run(verb, model, *([image] if verb == "predict" else []))
    assert status == 2
    assert message in err.splitlines()[-1]
    assert [line[:8] for line in err.splitlines() if line.startswith("edgefg: ")] == ["edgefg: "]
    assert "Traceback" not in err
    assert not out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "{tiny}", "no-such.jpg"], "no-such.jpg does not exist"),
        (["predict", "{tiny}", "{text}"], "is not an image"),
        (["evaluate", "{tiny}", "/no/such"], "/no/such"),
        (["evaluate", "{tiny}", "{birds}", "--split", "holdout"], "holdout"),
        (["predict", "model.xml", "{text}"], "and neither is model.xml"),
        (["predict", "model.pt", "{text}"], "no runtime opens 'model.pt'"),
        (["verify", "{tiny}", "--parent", "{tiny}"], "without --data"),
        (["train", "/no/such", "--out", "{out}"], "/no/such is not a folder"),
        (["train", "{birds}", "--out", "{out}", "--weights", "/no/such.pth"], "--weights /no/such.pth is not a file"),
        (["train", "{birds}", "--out", "{out}", "--backbone", "no_such"], "no backbone is called 'no_such'"),
        (["train", "{birds}", "--out", "{out}", "--method", "magic"], "no method 'magic'"),
        (["train", "{birds}", "--out", "{out}", "--train-size", "3"], "--train-size 3 is too small. Use 0, or"),
        (["train", "{birds}", "--out", "{out}", "--method", "bcnn", "-o", "pooling=x"], "Use one of full, compact"),
        (["train", "{birds}", "--out", "{out}", "--batch-size", "1"], "batch-size"),
        (["predict", "{folder}", "{text}"], "is a folder; give the model file in it"),
        (["verify", "x.safetensors"], "is a checkpoint; `edgefg export` makes an artifact of it"),
        (["distill", "/no/such.safetensors", "{birds}", "--out", "{out}"], "does not exist"),
        (["distill", "x", "{birds}", "--out", "{out}", "--temperature", "0"], "--temperature 0.0 is out of range"),
        (["distill", "x", "{birds}", "--out", "{out}", "--hard-weight", "2"], "--hard-weight 2.0 is out of range"),
        (["distill", "x", "{birds}", "--out", "{out}", "--feature-weight", "-1"], "--feature-weight -1.0 is out of"),
        (["export", "/no/such.safetensors", "--to", "onnx", "--out", "{out}"], "does not exist"),
        (["inspect", "/no/such.safetensors"], "does not exist"),
    ],
)
def test_a_user_s_mistake_is_told_without_traceback_and_status_2(
    run: Run, tiny: Tiny, birds: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "text.jpg").write_text("no image")
    places = {
        "tiny": tiny("ir"),
        "birds": birds,
        "text": tmp_path / "text.jpg",
        "out": tmp_path / "out",
        "folder": tmp_path,
    }
    status, _, err = run(*(argument.format(**places) for argument in arguments))
    assert status == 2
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "out" / "teacher.safetensors").exists()


def test_a_failed_check_is_status_1(run: Run, tiny: Tiny) -> None:
    model = tiny("ir")
    manifest = json.loads(model.with_suffix(".json").read_text())
    manifest["golden"]["parent_logits"] = 1e-30
    manifest["golden"]["logits"] = 1e-30
    model.with_suffix(".json").write_text(json.dumps(manifest))
    status, _, err = run("verify", model)
    assert status == 1
    assert err.startswith("edgefg: engine: deviates by")


def test_ctrl_c_is_one_line_and_status_130(run: Run, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("edgefg.image_io.image_files", interrupted)
    status, _, err = run("predict", tiny("null"), "x.jpg")
    assert status == 130
    assert err == "edgefg: interrupted; the same command resumes what can be resumed\n"


def test_a_stop_is_status_143_whatever_else_it_upsets(run: Run, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*args: Any, **kwargs: Any) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:  # as torch does, of loaders that got the signal too
            raise RuntimeError("DataLoader worker is killed")

    monkeypatch.setattr("edgefg.image_io.image_files", stopped)
    assert run("predict", tiny("null"), "x.jpg")[0] == 143


def test_a_failure_of_its_own_is_none_of_a_stop_s(run: Run, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def failed(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("edgefg.image_io.image_files", failed)
    with pytest.raises(RuntimeError, match="a bug"):
        run("predict", tiny("null"), "x.jpg")


def test_signal_handlers_are_restored(run: Run, tiny: Tiny) -> None:
    def own(*_: Any) -> None:
        """A handler of the application that calls main."""

    found = signal.signal(signal.SIGTERM, own)
    try:
        assert run("inspect", tiny("null"))[0] == 0
        assert signal.getsignal(signal.SIGTERM) is own
        assert run("inspect", "/no/such")[0] == 2
        assert signal.getsignal(signal.SIGTERM) is own
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, found)


def edgefg(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgefg", *map(str, arguments)]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, **options)


def test_a_reader_that_goes_away_is_no_error(tiny: Tiny) -> None:
    read, write = os.pipe()
    os.close(read)
    done = edgefg("inspect", tiny("null"), stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
def test_a_full_disk_is_one_line_and_status_2(tiny: Tiny) -> None:
    with Path("/dev/full").open("w") as full:
        done = edgefg("inspect", tiny("null"), stdout=full)
    assert (done.returncode, done.stderr) == (2, "edgefg: [Errno 28] No space left on device\n")
