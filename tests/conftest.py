"""Fixtures that the whole test tree shares; none of them needs torch."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from edgefg import cli
from edgefg.artifact.hashes import file_info
from edgefg.artifact.manifest import Manifest, decode_manifest, encode_manifest, manifest_path
from edgefg.preprocess import UInt8Array
from edgefg.quiet import without_telemetry
from tests.signal_stack import signal_stack
from tests.synthetic import MARKS, draw

# Tests import OpenVINO by themselves: it must not fork this process to send events each time that it converts a model.
with contextlib.suppress(ImportError), without_telemetry():
    import openvino  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
# An editable install may point to another clone; child processes, too, have to import this one.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
TINY = Path(__file__).resolve().parent / "assets" / "tiny"
MODELS = {
    "null": "null/model.null",
    "onnx": "onnx/model.onnx",
    "onnx-batch4": "onnx-batch4/model.onnx",
    "onnx-dynamic": "onnx-dynamic/model.onnx",
    "ir": "ir/model.xml",
}
Run = Callable[..., tuple[int, str, str]]
"""`edgefg ARGUMENTS`: exit status, standard output and standard error."""
Tiny = Callable[[str], Path]
"""Name of a committed artifact → path of a copy."""
Shared = Callable[[str, Callable[[Path], object]], Path]
"""Name and what makes it in a folder → the folder, made by the first who asks."""
Python = Callable[..., "subprocess.CompletedProcess[str]"]
"""Code for a fresh interpreter → what it printed."""
_GROCERY = Path(os.environ.get("EDGEFG_GROCERY") or ROOT.parent / "shared" / "data" / "grocery")

# For `python -c`: importing torch, or what follows as further arguments, raises as if it were not installed.
BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked by the test)", name=name)
sys.meta_path.insert(0, Blocker())
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep OpenVINO's compiled models out of the developer's cache."""
    monkeypatch.setenv("EDGEFG_CACHE", str(tmp_path_factory.getbasetemp() / "edgefg-cache"))


@pytest.fixture(scope="session", autouse=True)
def _first_signal_stack() -> tuple[int | None, int]:
    return signal_stack()


@pytest.fixture(autouse=True)
def _same_signal_stack(_first_signal_stack: tuple[int | None, int]) -> Iterator[None]:
    """Fail where a test leaves a signal stack of OpenVINO: a later signal would end the whole run."""
    yield
    assert signal_stack() == _first_signal_stack, "compile inside edgefg.signals.kept_signal_stack"


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """Make something once for all test files and all workers of a run; not to be spoilt."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    root.mkdir(exist_ok=True)

    def once(name: str, make: Callable[[Path], object]) -> Path:
        folder, made = root / name, root / f"{name}.made"
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a test that failed to make it
                folder.mkdir()
                make(folder)
                made.touch()
        return folder

    return once


@pytest.fixture(scope="session", autouse=True)
def _exports_are_shared(shared: Shared) -> Iterator[None]:
    """Export each network to ONNX once."""
    if "torch" not in sys.modules:
        yield
        return
    from tests.export_cache import sharing

    yield from sharing(shared("exports", lambda folder: None))


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    """Copy a committed tiny artifact to a folder that the test may spoil; returns its model file."""

    def copy(name: str) -> Path:
        model = TINY / MODELS[name]
        folder = tmp_path / model.parent.name
        shutil.copytree(model.parent, folder, dirs_exist_ok=True)
        return folder / model.name

    return copy


@pytest.fixture
def rewrite() -> Callable[..., Manifest]:
    """Change fields of an artifact's manifest; the recorded sizes and hashes follow the files as they are now."""

    def change(model: Path, **fields: Any) -> Manifest:
        path = manifest_path(model)
        manifest = decode_manifest(path.read_bytes(), path)
        values = {name: getattr(manifest, name) for name in manifest.__struct_fields__}
        values["files"] = tuple(file_info(model.parent / file.name) for file in manifest.files)
        manifest = Manifest(**(values | fields))
        path.write_bytes(encode_manifest(manifest))
        return manifest

    return change


@pytest.fixture(scope="session")
def birds() -> tuple[tuple[str, ...], list[UInt8Array]]:
    """Sixteen frames that the tiny network never saw, of sizes 48 to 180, with their labels."""
    kinds = sorted(list(MARKS)[:4]) * 4
    frames = [draw(np.random.default_rng([99, i]), kind, 96)[0] for i, kind in enumerate(kinds)]
    sides = np.random.default_rng(5).integers(64, 180, (len(kinds), 2)).tolist()
    return tuple(kinds), [
        cv2.resize(f, (max(s), max(s))) if i % 2 else f for i, (f, s) in enumerate(zip(frames, sides, strict=True))
    ]


@pytest.fixture(scope="session")
def grocery() -> Path:
    """The Grocery Store data set; skips where it is not on this machine."""
    if not (_GROCERY / "train").is_dir():
        pytest.skip(f"no Grocery Store data at {_GROCERY}; set EDGEFG_GROCERY")
    return _GROCERY


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `edgefg ARGUMENTS` in this process; returns exit status, standard output and standard error."""

    def call(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edgefg", *(str(argument) for argument in arguments)])
        capsys.readouterr()
        status = 0
        try:
            cli.main()
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        output = capsys.readouterr()
        return status, output.out, output.err

    return call


@pytest.fixture
def python() -> Python:
    """Run code in a fresh interpreter in which importing any of ``blocked`` raises."""

    def run(code: str, *arguments: Any, blocked: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        script = f"BLOCKED = {blocked!r}\n{BLOCKER}\n{code}"
        return subprocess.run(
            [sys.executable, "-W", "error", "-c", script, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT.parent,
        )

    return run
