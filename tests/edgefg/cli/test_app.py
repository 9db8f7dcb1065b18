"""The help, the options made from settings, usage errors and completion of all verbs."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest

from edgefg import __version__, cli
from edgefg.cli.app import app
from tests.conftest import BLOCKER, Python, Run

PANELS = ("Data", "Train", "Compress", "Export", "Device", "Measure")
VERBS = {verb: panel for panel in PANELS for verb in vars(getattr(cli, panel.lower())) if verb in list(app)}


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def entries(text: str) -> dict[str, str]:
    """Everything that a help lists, by name, with its description."""
    return dict(re.findall(r"^│ \*? *(\S+)(?: [^ ]+)* {2,}(\S.*\S) *│$", text, flags=re.MULTILINE))


def described(run: Run, verb: str) -> str:
    """The help of a verb on one line."""
    status, out, err = run(verb, "--help")
    assert (status, err) == (0, "")
    return re.sub(r"[\s│]+", " ", out)


def test_verbs_stand_in_panels_in_the_order_of_the_work(run: Run) -> None:
    status, out, err = run("--help")
    assert (status, err) == (0, "")
    titles = re.findall(r"^╭─ (\w+)", out, flags=re.MULTILINE)
    assert titles == [*PANELS, "General"]
    assert len(VERBS) == 22
    for title, box in zip(titles, re.split("^╭", out, flags=re.MULTILINE)[1:], strict=True):
        if title in PANELS:
            assert set(entries(box)) == {verb for verb, panel in VERBS.items() if panel == title}
    assert run()[1] == out


def test_lists_of_verbs_fit_in_80_columns(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = run("--help")
    found = entries(out)
    assert found.keys() >= VERBS.keys()
    assert [text for text in found.values() if not text.endswith(".")] == []


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_argument_and_option_is_described(run: Run, verb: str) -> None:
    status, out, err = run(verb, "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"Usage: edgefg {verb} ")
    found = entries(out)
    function = app[verb].default_command
    assert function is not None
    parameters = inspect.signature(function).parameters.values()
    assert len(parameters) >= 1
    for parameter in parameters:
        names = [parameter.name.upper(), f"--{parameter.name.replace('_', '-')}", "--for", "--out"]
        text = next((found[name] for name in names if name in found), "")
        assert re.search(r"\w{2}", text), parameter.name


def test_options_have_their_help_default_and_choices_from_the_settings(run: Run) -> None:
    text = described(run, "verify")
    assert re.search(r"─ Gate ─+╮ --max-drop [^─]*?\[default: 1.0\]", text)
    assert "--json Print the result as JSON. --" not in text
    assert "[choices: none, mixup, cutmix, snapmix] [default: none]" in described(run, "train")


def test_a_verb_has_its_own_defaults(run: Run) -> None:
    for verb, epochs, rate in (("train", 10, 0.001), ("prune", 5, 0.0005), ("qat", 3, 3e-05)):
        text = described(run, verb)
        assert re.search(rf"--epochs [^─]*?\[default: {epochs}\]", text), verb
        assert re.search(rf"--lr [^─]*?\[default: {rate}\]", text), verb


def test_given_options_change_only_themselves(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr("edgefg.export.prune.prune.prune", lambda *args, **kwargs: seen.update(args=args, **kwargs))
    status, _, err = run("prune", "s", "d", "--out", "o", "--epochs", 2, "--max-ratio=0.5", "--isomorphic")
    assert (status, err) == (0, "")
    *_, training, pruning = seen["args"]
    assert (pruning.max_ratio, pruning.isomorphic, pruning.round_to) == (0.5, True, 16)
    assert "epochs=2" in repr(training)
    assert "lr=0.0005" in repr(training)


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"edgefg {__version__}\n", "")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("fly", 'Unknown command "fly". Available commands: '),
        ("trian x", 'Unknown command "trian". Did you mean "train"?'),
        ("predict", "ARTIFACT requires a value. See edgefg predict --help"),
        ("predict a", "IMAGES requires a value."),
        ("train d", "--out requires a value. See edgefg train --help"),
        ("train d --out o --lr", "--lr requires a value."),
        ("train d --out o --lrr 1", "Unknown option: --lrr. Did you mean --lr?"),
        ("train d --out o --lr fast", 'Invalid value for --lr: unable to convert "fast" into float.'),
        ("train d --out o --lr 1 --lr 2", "Parameter --lr specified multiple times."),
        ("train d extra --out o", "Unexpected argument: extra. See edgefg train --help"),
        ("train d --out o --mix x", 'Invalid value "x" for --mix. Choose from: "none", "mixup", "cutmix", "snapmix".'),
        ("train d --out o --epochs 0", "--epochs 0 is out of range: Expected `int` >= 1"),
        ("train d --out o --lr -1", "--lr -1.0 is out of range"),
        ("predict a b --top-k 0", 'Invalid value "0" for --top-k. Must be >= 1.'),
        ("folds d --out o --clusters-per-class -3", 'Invalid value "-3" for --clusters-per-class. Must be >= 0.'),
        ("export c --to coreml --out o", 'Invalid value "coreml" for --to. Choose from: "openvino", "onnx", '),
        ("check m --for coreml", 'Invalid value "coreml" for --for. Choose from: "tensorrt".'),
        ("build m --precision int4", 'Invalid value "int4" for --precision.'),
    ],
)
def test_a_usage_error_is_one_line_and_status_2(run: Run, line: str, said: str) -> None:
    status, out, err = run(*line.split())
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"edgefg: {said}")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: Literal["bash", "zsh", "fish"], tmp_path: Path) -> None:
    script = app.generate_completion(shell=shell)
    for word in (*VERBS, "--max-drop", "snapmix"):
        assert word in script
    if shutil.which(shell):
        (tmp_path / "script").write_text(script, encoding="utf-8")
        assert subprocess.run([shell, "-n", tmp_path / "script"], check=False).returncode == 0


@pytest.mark.parametrize(
    "locale",
    [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"},
     {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
    ids=str,
)  # fmt: skip
def test_a_terminal_without_greek_letters(locale: dict[str, str]) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG"))}
    command = [sys.executable, "-m", "edgefg", "train", "--help"]
    done = subprocess.run(command, capture_output=True, env=environment | locale, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"mix-alpha" in done.stdout


def test_json_is_ascii_where_it_has_to_be(python: Python) -> None:
    code = "from edgefg.cli.app import print_json\nsys.stdout.reconfigure(encoding=sys.argv[1])\nprint_json({'é': 1})"
    for encoding in ("utf-8", "ascii", "latin-1"):
        done = python(code, encoding)
        assert json.loads(done.stdout) == {"é": 1}, done.stderr


def test_the_help_loads_no_engine(python: Python) -> None:
    done = python(
        "from edgefg.cli import main\nsys.argv = ['edgefg', '--help']\ntry:\n    main()\nfinally:\n"
        "    print([name for name in ('cv2', 'torch', 'onnx', 'openvino') if name in sys.modules], file=sys.stderr)"
    )
    assert (done.returncode, done.stderr) == (0, "[]\n")


def test_a_workstation_verb_on_a_device_names_the_extra() -> None:
    code = BLOCKER.replace("BLOCKED", "{'torch', 'timm', 'lightning_fabric'}") + "from edgefg.cli import main; main()"
    for line, extra in (("train d --out o", "train"), ("distill t d --out o", "export")):
        done = subprocess.run([sys.executable, "-c", code, *line.split()], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert f"pip install 'edgefg[{extra}]'" in done.stderr
        assert len(done.stderr.splitlines()) == 1
