from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import msgspec
import pytest

from edgefg import __version__, cli
from edgefg.cli.app import offered_options
from tests.conftest import BLOCKER
from tests.synthetic import write_dataset

VERBS = (
    *("train", "methods", "ensemble", "folds", "distill", "prune", "qat", "export", "compress", "pipeline"),
    *("data", "predict", "evaluate", "explain", "verify", "bench", "inspect", "doctor"),
    *("build", "check", "sensitivity", "sign"),
)


@pytest.fixture(scope="module")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("cli"), classes=4, per_class=8, size=72, seed=5)


def image_of(birds: Path) -> Path:
    return sorted((birds / "test").rglob("*.*g"))[0]


def option_names(function: Callable[..., None]) -> list[str]:
    """The parameters of a verb, those that are structs of settings replaced by the fields that are offered."""
    names: list[str] = []
    for name, hint in typing.get_type_hints(function, include_extras=True).items():
        base, *extras = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
        if name == "return":
            continue
        if isinstance(base, type) and issubclass(base, msgspec.Struct):
            names += [option.name for option in offered_options(hint)]
        else:
            # Typer keeps an option's own spelling, in Annotated, where a default would stand.
            spelt = [extra.default for extra in extras if str(getattr(extra, "default", "")).startswith("--")]
            names.append(spelt[0].removeprefix("--") if spelt else name)
    return names


def test_every_verb_is_there_with_help_for_every_option(run) -> None:
    status, out, _ = run("--help")
    assert status == 0
    listed = re.findall(r"^  (\w+)  ", out.partition("Commands:")[2], flags=re.MULTILINE)
    assert sorted(listed) == sorted(VERBS)
    modules = [module for module in vars(cli).values() if getattr(module, "__name__", "").startswith("edgefg.cli.")]
    for verb in VERBS:
        status, out, _ = run(verb, "--help")
        assert status == 0
        function = next(vars(module)[verb] for module in modules if verb in vars(module))
        for name in option_names(function):
            assert re.search(rf"(--{name.replace('_', '-')}|{name}(\.\.\.)?) .*\S", out), f"{verb}: {name}"


@pytest.mark.parametrize("kind", ["ir", "onnx", "null"])
def test_predict(run, tiny, birds: Path, kind: str) -> None:
    status, out, err = run("predict", tiny(kind), image_of(birds), "--json")
    assert (status, err) == (0, "")
    answer = json.loads(out)
    assert answer["label"] == answer["top_k"][0]["label"]
    assert len(answer["top_k"]) == 3
    assert set(answer["timings"]) == {"preprocess", "infer", "decide"}
    status, out, _ = run("predict", tiny(kind), birds / "test", "--top-k", 1)
    assert status == 0
    assert len(out.splitlines()) == len(list((birds / "test").rglob("*.*g")))
    assert answer["label"] in out.splitlines()[0]


def test_predict_goes_on_after_an_unreadable_image(run, tiny, birds: Path, tmp_path: Path) -> None:
    good = image_of(birds)
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"\xff\xd8")
    status, out, err = run("predict", tiny("onnx"), bad, good, "--json")
    assert status == 2
    lines = [json.loads(line) for line in out.splitlines()]
    assert "cut off" in lines[0]["error"]
    assert lines[1]["label"]
    assert err.count("\n") == 1


def test_version(run) -> None:
    assert run("--version") == (0, f"edgefg {__version__}\n", "")


def test_predict_runs_where_importing_torch_raises(tiny, birds: Path) -> None:
    code = BLOCKER.replace("BLOCKED", "{'torch', 'onnx', 'timm', 'tqdm', 'nncf'}")
    code += "from edgefg.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "predict", str(tiny("ir")), str(image_of(birds))], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "%" in done.stdout


def test_a_workstation_verb_on_a_device_names_the_extra(tiny, birds: Path, tmp_path: Path) -> None:
    code = BLOCKER.replace("BLOCKED", "{'torch', 'timm', 'lightning_fabric'}") + "from edgefg.cli import main; main()"
    for verb, extra in (
        (["train", birds, "--out", tmp_path], "train"),
        (["distill", "t", birds, "--out", "o"], "export"),
    ):
        done = subprocess.run([sys.executable, "-c", code, *map(str, verb)], capture_output=True, text=True)
        assert done.returncode == 2
        assert f"pip install 'edgefg[{extra}]'" in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_evaluate_verify_inspect_and_doctor(run, tiny, birds: Path) -> None:
    status, out, _ = run("evaluate", tiny("onnx"), birds, "--json")
    scores = json.loads(out)
    assert status == 0
    assert scores["split"] == "test"
    assert scores["top1"] > 0.5
    status, out, _ = run("evaluate", tiny("onnx"), birds, "--split", "val")
    assert status == 0
    assert re.search(r"^split +val$", out, flags=re.MULTILINE)
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
    status, out, _ = run("doctor", "--json")
    assert json.loads(out)["packages"]["core"]["numpy"]
    status, out, _ = run("doctor")
    assert status == 0


def test_bench_prints_a_table_then_one_json_line(run, tiny, tmp_path: Path) -> None:
    status, out, _ = run(
        "bench", tiny("null"), "--iterations", 4, "--rounds", 2, "--warmup", 1, "--json", tmp_path / "r.json"
    )
    assert status == 0
    assert "p99" in out
    assert json.loads(out.splitlines()[-1]) == json.loads((tmp_path / "r.json").read_text())


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
        (lambda model: model.with_suffix(".json").unlink(), "needed the manifest"),
        (lambda model: model.with_suffix(".json").write_text('{"schema": 7}'), "has schema 7"),
    ],
)
@pytest.mark.parametrize("verb", ["predict", "verify", "inspect", "bench"])
def test_an_artifact_that_cannot_be_trusted_is_one_line_and_status_2(
    run, tiny, birds: Path, spoil, message: str, verb: str
) -> None:
    model = tiny("ir")
    spoil(model)
    status, out, err = run(verb, model, *([image_of(birds)] if verb == "predict" else []))
    assert status == 2
    assert message in err.splitlines()[-1]
    assert [line[:8] for line in err.splitlines() if not line.startswith("== ")] == ["edgefg: "]
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
        (["predict", "{tiny}", "{birds}", "--top-k", "0"], "top-k"),
        (["verify", "{tiny}", "--parent", "{tiny}"], "without data"),
        (["train", "/no/such", "--out", "{out}"], "/no/such is not a folder"),
        (["train", "{birds}", "--out", "{out}", "--weights", "/no/such.pth"], "--weights /no/such.pth is neither"),
        (["train", "{birds}", "--out", "{out}", "--backbone", "no_such"], "no backbone is called 'no_such'"),
        (["train", "{birds}", "--out", "{out}", "--method", "magic"], "no method 'magic'"),
        (["train", "{birds}", "--out", "{out}", "--lr", "-1"], "out of range"),
        (["train", "{birds}", "--out", "{out}", "--epochs", "0"], "epochs"),
        (["train", "{birds}", "--out", "{out}", "--mix", "x"], "--mix 'x' is not a choice. Use one of none, mixup,"),
        (
            ["train", "{birds}", "--out", "{out}", "--train-size", "3"],
            "--train-size 3 is too small. Use 0, or at least 16",
        ),
        (["train", "{birds}", "--out", "{out}", "--method", "bcnn", "-o", "pooling=x"], "Use one of full, compact"),
        (["folds", "{birds}", "--out", "{out}", "--clusters-per-class", "-3"], "--clusters-per-class"),
        (["train", "{birds}", "--out", "{out}", "--batch-size", "1"], "batch-size"),
        (["predict", "{folder}", "{text}"], "is a folder; give the model file in it"),
        (["verify", "x.safetensors"], "is a checkpoint; `edgefg export` makes an artifact of it"),
        (["distill", "/no/such.safetensors", "{birds}", "--out", "{out}"], "is not there"),
        (["distill", "x", "{birds}", "--out", "{out}", "--loss", "x"], "--loss 'x' is not a choice. Use one of kl,"),
        (["distill", "x", "{birds}", "--out", "{out}", "--temperature", "0"], "--temperature 0.0 is out of range"),
        (["distill", "x", "{birds}", "--out", "{out}", "--hard-weight", "2"], "--hard-weight 2.0 is out of range"),
        (["distill", "x", "{birds}", "--out", "{out}", "--feature-weight", "-1"], "--feature-weight -1.0 is out of"),
        (["export", "/no/such.safetensors", "--to", "onnx", "--out", "{out}"], "is not there"),
        (["export", "x", "--to", "coreml", "--out", "{out}"], "coreml"),
        (["inspect", "/no/such.safetensors"], "is not there"),
        (["predict"], "Missing argument"),
        (["fly"], "fly"),
    ],
)
def test_a_user_s_mistake_is_told_without_traceback_and_status_2(
    run, tiny, birds: Path, tmp_path: Path, arguments: list[str], message: str
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


def test_a_failed_check_is_status_1(run, tiny) -> None:
    model = tiny("ir")
    manifest = json.loads(model.with_suffix(".json").read_text())
    manifest["golden"]["parent_logits"] = 1e-30
    manifest["golden"]["logits"] = 1e-30
    model.with_suffix(".json").write_text(json.dumps(manifest))
    status, _, err = run("verify", model)
    assert status == 1
    assert err.startswith("edgefg: engine: deviates by")


def test_ctrl_c_is_one_line_and_status_130(run, tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.device, "image_files", interrupted)
    status, _, err = run("predict", tiny("null"), "x.jpg")
    assert status == 130
    assert err == "edgefg: interrupted; the same command resumes what can be resumed\n"


def test_a_stop_is_status_143_whatever_else_it_upsets(run, tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*args: object, **kwargs: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:  # as torch does, of loaders that got the signal too
            raise RuntimeError("DataLoader worker is killed")

    monkeypatch.setattr(cli.device, "image_files", stopped)
    assert run("predict", tiny("null"), "x.jpg")[0] == 143


def test_a_failure_of_its_own_is_none_of_a_stop_s(run, tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def failed(*args: object, **kwargs: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli.device, "image_files", failed)
    with pytest.raises(RuntimeError, match="a bug"):
        run("predict", tiny("null"), "x.jpg")
