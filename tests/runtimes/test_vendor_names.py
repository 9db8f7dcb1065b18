"""Every vendor name that our code uses exists in the vendors' real bindings; the list is read off our source.

TensorRT's bindings import without a GPU once empty libraries satisfy their linker, cuda-python without a driver.
PyCUDA is left out: it has no wheel, and does not build without CUDA's headers.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.runtimes.vendor_names import RETURNS, Found, read_names

ROOMS = ("edgefg", "export", "runtimes", "benchmarks")
MUST_USE = {"runtimes/tensorrt.py", "runtimes/cuda.py", "export/tensorrt/worker.py"}
# The folders that `make .venv/.bindings` fills: the lowest and the last of each major version.
BINDINGS = {
    **{"trt10-lowest": ("tensorrt", "10.3."), "trt10": ("tensorrt", "10.16."), "trt11": ("tensorrt", "11.")},
    **{"cuda12": ("cuda.bindings", "12.9."), "cuda13": ("cuda.bindings", "13.")},
}
# What the bindings' linker asks for; they are not called.
SYMBOLS = """createInferBuilder_INTERNAL createInferRefitter_INTERNAL createInferRuntime_INTERNAL getNvOnnxParserVersion
createNvOnnxParser_INTERNAL createNvOnnxParserRefitter_INTERNAL getBuilderPluginRegistry getPluginRegistry
initLibNvInferPlugins"""
# Finds names, and docstrings that do not say what RETURNS says, in a process of its own: each package is there twice.
FINDER = """
import importlib, json, pkgutil, sys
root, names, returns = json.load(sys.stdin)
sys.modules[root] = package = importlib.import_module("tensorrt_bindings" if root == "tensorrt" else root)
missing = []
for name in names:
    try:
        pkgutil.resolve_name(name)
    except (AttributeError, ImportError):
        missing.append(name)
for name, given in returns.items():
    parent, _, last = name.rpartition(".")
    said = pkgutil.resolve_name(name).__doc__ or ""
    if given not in said and f"{last} : {given}" not in (pkgutil.resolve_name(parent).__doc__ or ""):
        missing.append(f"{name} -> {given}")
print(json.dumps([package.__version__, missing]))
"""
each_binding = pytest.mark.parametrize("binding", BINDINGS)


@functools.cache
def _ours(*, guarded: bool = True) -> dict[str, Found]:
    """What each of our files uses; benchmarks' peers have environments of their own."""
    paths = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py") if "peers" not in path.parts)
    files = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    return {file: found for file, code in files.items() if any(found := read_names(code, file, guarded=guarded))}


@pytest.fixture(scope="session")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of empty libraries in place of TensorRT's."""
    if shutil.which("gcc") is None:
        pytest.skip("TensorRT's bindings need empty libraries to link with, and there is no gcc to make them")
    folder = tmp_path_factory.mktemp("stubs")
    source = folder / "stub.c"
    source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in SYMBOLS.split()))
    for library in ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser"):
        for major in (10, 11):
            subprocess.run(["gcc", "-shared", "-fPIC", "-o", folder / f"{library}.so.{major}", source], check=True)
    return folder


def _missing(binding: str, stubs: Path, names: list[str]) -> list[str]:
    (root, version), folder = BINDINGS[binding], Path(sys.prefix) / "bindings" / binding
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there: make .venv/.bindings")
    question = [root, names, {name: given for name, given in RETURNS.items() if name.startswith(f"{root}.")}]
    environment = {**os.environ, "PYTHONPATH": str(folder), "LD_LIBRARY_PATH": str(stubs)}
    command = [sys.executable, "-S", "-c", FINDER]  # -S: nothing but that folder
    done = subprocess.run(command, input=json.dumps(question), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found, missing = json.loads(done.stdout.splitlines()[-1])
    assert found.startswith(version)
    return list(missing)


def test_no_vendor_name_escapes() -> None:
    assert set(_ours()) >= MUST_USE
    assert not sorted(problem for found in _ours().values() for problem in found.problems)


@each_binding
def test_every_name_exists(binding: str, stubs: Path) -> None:
    ours = _ours(guarded=not binding.endswith("-lowest"))  # the lowest may lack what our code does without
    names = sorted({name for found in ours.values() for name in found.names if name.startswith(BINDINGS[binding][0])})
    print(f"{binding}: {len(names)} names")
    assert len(names) > 20
    assert not _missing(binding, stubs, names)


@each_binding
def test_a_wrong_name_is_found_missing(binding: str, stubs: Path) -> None:
    right, wrong = "from cuda.bindings import runtime\nruntime.cudaMalloc(1)", "cuda.bindings.runtime.cudaMallocs"
    if BINDINGS[binding][0] == "tensorrt":
        right, wrong = "def f(e: trt.ICudaEngine): e.num_io_tensors", "tensorrt.ICudaEngine.get_binding_shape"
    code = f"{right}, {wrong.replace('cuda.bindings.', '').replace('tensorrt.ICudaEngine', 'e')}(0)"
    assert _missing(binding, stubs, sorted(read_names(code).names)) == [wrong]


READ = [
    ("import tensorrt as t\nt.BuilderFlag.TF32", "BuilderFlag BuilderFlag.TF32"),
    ("def f(e: trt.IEngine | None): e.size = len(e.name)", "IEngine IEngine.size IEngine.name"),
    ("class W:\n c: trt.IC\ndef f(w: W): w.c.run()", "IC IC.run"),
    ("class W:\n def f(s): s.g().run()\n def g(s) -> 'trt.IC': ...", "IC IC.run"),
    ("class L(trt.IL):\n def log(self): self.level\n def _own(self): ...", "IL IL.log IL.level"),
    ("l: list[trt.IT] = f()\n[t.name for t in l]", "IT IT.name"),
    ("levels = trt.Level if x else trt.Other\nlevels.A", "Level Level.A Other Other.A"),
    ("try: trt.A.b\nexcept (OSError, AttributeError): trt.C\ntry: trt.D\nexcept TypeError: ...", "C D"),
]
ESCAPES = [
    *("a = trt.A()\na.b", "trt.A().b", "def f(e: trt.E):\n e.s.x", "with trt.A() as a: a.b", "a, *_ = trt.A()\na.b"),
    *("def f(p: Any): p.x\nf(trt.A())", "getattr(trt, n)", "[a.b for a in trt.A()]", "class W: ...\nW.a = trt.A().b"),
    *("trt.A; importlib.import_module('tensorrt')", "class W:\n def f(s): s.a = trt.A(); s.a.b"),
    "def f() -> Any: ...\nf().x; trt.A",
]


@pytest.mark.parametrize(("code", "names"), READ)
def test_names_are_read_off(code: str, names: str) -> None:
    found = read_names(code, guarded=False)
    assert not found.problems
    assert found.names - {"tensorrt"} == {f"tensorrt.{name}" for name in names.split()}


@pytest.mark.parametrize("code", ESCAPES)
def test_what_cannot_be_read_off_is_told(code: str) -> None:
    assert len(read_names(code).problems) == 1
