"""Who may import whom (design.md), how large a file may be, and what importing edgefg loads."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import edgefg
from tests.conftest import ROOT, TINY

Python = Callable[..., "subprocess.CompletedProcess[str]"]

ROOMS = {"edgefg": "edgefg", "edgefg/training": "edgefg.training"} | {
    room: f"edgefg.{room}" for room in ("export", "runtimes", "benchmarks")
}
VENDORS = {
    "torch", "torchvision", "timm", "lightning", "lightning_fabric", "torchmetrics", "safetensors",
    "onnx", "onnxscript", "onnx_ir", "onnxruntime", "openvino", "nncf", "tensorrt", "cuda", "pycuda", "torch_pruning",
}  # fmt: skip
CORE_PACKAGES = {"numpy", "cv2", "msgspec"}
# Imported on the first call only, so that `import edgefg` stays small.
LAZY_IN_CORE = {"cv2"}
# An extra that one file of the core imports inside its functions: only who asks for signatures needs it.
OPTIONAL_IN_CORE = {"edgefg.signature": {"cryptography"}}
RUNTIME_VENDORS = {
    "null": set(),
    "ort": {"onnxruntime"},
    "ov": {"openvino"},
    "trt": {"tensorrt", "cuda", "pycuda"},
    "cuda": {"cuda", "pycuda"},
    "trt_context": {"tensorrt"},
}
SHARED_BY_RUNTIMES = {"edgefg.runtimes.cuda", "edgefg.runtimes.trt_context"}
TORCHLESS_EXPORT = (
    "to_tensorrt",
    "race",
    "timing",
    "builder",
    "build_plan",
    "package",
    "verify",
    "gate",
    "measure",
    "temperature",
    "rules",
    "graph",
    "half",
    "sensitive",
    "check",
)


class Import(NamedTuple):
    module: str
    inside: str
    """The enclosing function's qualified name; empty at the top level."""
    line: int

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]


class Source(NamedTuple):
    path: Path
    module: str
    room: str

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text(encoding="utf-8"))


def _sources() -> list[Source]:
    found = []
    for folder, package in ROOMS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if folder == "edgefg" and parts[0] == "training":
                continue
            if folder == "benchmarks" and parts[0] == "peers":
                continue  # scripts of virtual environments of their own
            name = ".".join([package, *(part for part in parts if part != "__init__")])
            found.append(Source(path, name, package))
    return found


SOURCES = _sources()
each_source = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.module)


def _imports(source: Source) -> list[Import]:
    found: list[Import] = []

    def visit(node: ast.AST, inside: tuple[str, ...]) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, ".".join(inside), node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source.path}:{node.lineno}: a relative import"
            assert node.module is not None
            for alias in node.names:
                # `from edgefg import export` names a room by its alias.
                found.append(Import(f"{node.module}.{alias.name}", ".".join(inside), node.lineno))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inside = (*inside, node.name)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for statement in node.body:
                visit(statement, ("TYPE_CHECKING",))
            for statement in node.orelse:
                visit(statement, inside)
            return
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(source.tree, ())
    return found


def _room(module: str) -> str | None:
    """The room of a module of this project; None for a foreign one."""
    parts = module.split(".")
    if parts[0] != "edgefg":
        return None
    return ".".join(parts[:2]) if len(parts) > 1 and f"edgefg.{parts[1]}" in ROOMS.values() else "edgefg"


def _is_cli(module: str) -> bool:
    return f"{module}.".startswith("edgefg.cli.")


def _in_command(source: Source, found: Import) -> bool:
    """Whether the command line, the one composition root, imports this not before a command runs."""
    return _is_cli(source.module) and bool(found.inside)


def _is_foreign(name: str) -> bool:
    return name != "edgefg" and name not in sys.stdlib_module_names


def _complain(source: Source, wrong: list[Import]) -> None:
    assert not wrong, "\n".join(f"{source.path}:{i.line}: {i.module} (in {i.inside or 'the top level'})" for i in wrong)


def test_every_room_has_files() -> None:
    assert {source.room for source in SOURCES} == set(ROOMS.values())
    assert len(SOURCES) > 20


def test_the_reader_of_imports_sees_all_kinds() -> None:
    code = (
        "import os.path\nif TYPE_CHECKING:\n    import a\nelse:\n    import b\n"
        "class C:\n    def f(self):\n        try:\n            from edgefg import export\n        except E: pass\n"
    )

    class Fake(Source):
        @property
        def tree(self) -> ast.Module:
            return ast.parse(code)

    found = {(i.module, i.inside) for i in _imports(Fake(Path("x.py"), "x", "x"))}
    assert found == {("os.path", ""), ("a", "TYPE_CHECKING"), ("b", ""), ("edgefg.export", "C.f")}
    assert _room("edgefg.export") == "edgefg.export"
    assert _room("edgefg.decide.softmax") == "edgefg"
    assert _room("torch.nn") is None


@each_source
def test_rooms_import_only_along_the_arrows(source: Source) -> None:
    allowed = {
        "edgefg": {"edgefg"},
        "edgefg.runtimes": {"edgefg", "edgefg.runtimes"},
        "edgefg.training": {"edgefg", "edgefg.training"},
        "edgefg.export": {"edgefg", "edgefg.training", "edgefg.export"},
        "edgefg.benchmarks": {"edgefg", "edgefg.benchmarks"},
    }[source.room]
    wrong = []
    for found in _imports(source):
        room = _room(found.module)
        if room is not None and room not in allowed and not _in_command(source, found):
            wrong.append(found)
        if found.top in ("export", "runtimes", "benchmarks", "training", "tests"):
            wrong.append(found)
    _complain(source, wrong)


@pytest.mark.parametrize("source", [s for s in SOURCES if s.room == "edgefg"], ids=lambda source: source.module)
def test_core_needs_its_own_packages_only(source: Source) -> None:
    packages = CORE_PACKAGES | ({"typer"} if _is_cli(source.module) else set())
    optional = OPTIONAL_IN_CORE.get(source.module, set())
    wrong = []
    for found in _imports(source):
        allowed = packages | (optional if found.inside else set())
        if _is_foreign(found.top) and found.top not in allowed and not _in_command(source, found):
            wrong.append(found)
        if found.top in LAZY_IN_CORE and not found.inside:
            wrong.append(found)
    _complain(source, wrong)


@pytest.mark.parametrize(
    "source", [s for s in SOURCES if s.room == "edgefg.runtimes"], ids=lambda source: source.module
)
def test_runtimes_import_one_vendor_inside_the_constructor(source: Source) -> None:
    name = source.module.rpartition(".")[2]
    vendors = RUNTIME_VENDORS.get(name, set())
    wrong = []
    for found in _imports(source):
        if found.top in CORE_PACKAGES or not _is_foreign(found.top):
            continue
        in_constructor = found.inside.endswith(".__init__") or found.inside == "TYPE_CHECKING"
        if found.top not in vendors or not in_constructor:
            wrong.append(found)
    others = {f"edgefg.runtimes.{other}" for other in RUNTIME_VENDORS} - {source.module, *SHARED_BY_RUNTIMES}
    wrong += [found for found in _imports(source) if any(f"{found.module}.".startswith(f"{o}.") for o in others)]
    _complain(source, wrong)


@pytest.mark.parametrize(
    "source", [s for s in SOURCES if s.room == "edgefg.benchmarks"], ids=lambda source: source.module
)
def test_benchmarks_import_no_training_package_and_an_engine_in_functions_only(source: Source) -> None:
    engines = {"openvino", "onnxruntime", "tensorrt", "cuda", "pycuda"}  # bare requests, to compare with
    wrong = [found for found in _imports(source) if found.top in VENDORS - engines]
    wrong += [found for found in _imports(source) if found.top in engines and not found.inside]
    _complain(source, wrong)


@each_source
def test_files_and_functions_are_small(source: Source) -> None:
    lines = source.path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 400, f"{source.path} has {len(lines)} lines"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            length = body[-1].end_lineno - body[0].lineno + 1 if body else 0  # type: ignore[operator]
            assert length <= 50, f"{source.path}:{node.lineno}: {node.name} has {length} lines"


@each_source
def test_every_file_says_its_job_first(source: Source) -> None:
    if source.path.stat().st_size:
        docstring = ast.get_docstring(source.tree)
        assert docstring, f"{source.path} has no docstring"
        assert docstring.splitlines()[0].rstrip(), source.path


def test_public_names() -> None:
    assert sorted(edgefg.__all__) == [
        "Classifier",
        "DeviceMismatchError",
        "EdgefgError",
        "FrameError",
        "IntegrityError",
        "ManifestError",
        "Prediction",
        "RuntimeUnavailableError",
        "__version__",
    ]
    assert len(edgefg.__all__) < 10
    assert all(hasattr(edgefg, name) for name in edgefg.__all__)


def test_version_is_that_of_the_project() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.findall(r'^version = "(.+)"$', project, re.MULTILINE) == [edgefg.__version__]


def test_import_loads_no_heavy_package(python: Python) -> None:
    heavy = sorted(VENDORS | {"cv2", "typer", "hypothesis", "PIL", "cryptography"})
    code = f"import json, edgefg; print(json.dumps([m for m in {heavy!r} if m in sys.modules]))"
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == []


@pytest.mark.parametrize("model", ["null/model.null", "onnx/model.onnx", "ir/model.xml"])
def test_device_classifies_without_torch(python: Python, model: str) -> None:
    code = """
import edgefg, cv2, numpy as np
with edgefg.Classifier(sys.argv[1], threads=1, verify=True) as classifier:
    print(classifier.predict(np.full((90, 120, 3), 128, np.uint8)).label)
assert "torch" not in sys.modules and "edgefg.export" not in sys.modules
"""
    blocked = ("torch", "torchvision", "onnx", "timm", "nncf", "typer", "safetensors", "PIL")
    result = python(code, TINY / model, blocked=blocked)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() in ("bar", "cross", "disc", "pair")


def test_blocking_torch_works(python: Python) -> None:
    result = python("import torch", blocked=("torch",))
    assert result.returncode == 1
    assert "blocked by the test" in result.stderr


def _modules_without_torch() -> Iterator[str]:
    for source in SOURCES:
        name = source.module.rpartition(".")[2]
        on_device = source.room in ("edgefg", "edgefg.runtimes", "edgefg.benchmarks")
        if on_device or (source.room == "edgefg.export" and name in TORCHLESS_EXPORT):
            yield source.module


@pytest.mark.parametrize("module", sorted(_modules_without_torch()))
def test_device_modules_import_without_torch(python: Python, module: str) -> None:
    blocked = ("torch", "torchvision", "timm", "openvino", "onnxruntime", "tensorrt", "nncf")
    result = python(f"import importlib; importlib.import_module({module!r})", blocked=blocked)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_wheel_claims_only_edgefg(tmp_path: Path) -> None:
    tree = tmp_path / "tree"  # a copy: building leaves `build/` behind, and a stale one would be packed
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "runs", "tests", "*.egg-info")
    shutil.copytree(ROOT, tree, ignore=unwanted)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(tree),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"edgefg", f"edgefg-{edgefg.__version__}.dist-info"}
    expected = {source.module.replace(".", "/") for source in SOURCES}
    packed = {name.removesuffix(".py").removesuffix("/__init__") for name in names if name.endswith(".py")}
    assert packed == expected
    assert "edgefg/py.typed" in names
