"""The shape of the code base: file and function sizes, public names, what `import edgefg` loads, what a wheel holds.

Who may import whom is checked by import-linter (``make check``); its contracts are in pyproject.toml.
"""

from __future__ import annotations

import ast
import functools
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

import edgefg
from tests.conftest import ROOT, TINY, Python

ROOMS = ("edgefg", "export", "runtimes", "benchmarks")
NOT_IN_THE_WHEEL = ("benchmarks/peers/", "benchmarks/experiments/")
VENDORS = {
    "torch", "torchvision", "timm", "lightning_fabric", "torchmetrics", "safetensors", "onnx", "onnxscript", "onnx_ir",
    "onnxruntime", "openvino", "nncf", "tensorrt", "cuda", "pycuda", "torch_pruning",
}  # fmt: skip


class Source(NamedTuple):
    path: Path
    module: str

    @functools.cache  # noqa: B019  # one small object per file
    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text(encoding="utf-8"))


def _sources() -> list[Source]:
    found = []
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            relative = path.relative_to(ROOT).with_suffix("")
            if any((ROOT / Path(*relative.parts[:i])).is_symlink() for i in range(1, len(relative.parts))):
                continue  # the same file, seen through a link
            parts = [part for part in relative.parts if part != "__init__"]
            found.append(Source(path, ".".join(parts if room == "edgefg" else ["edgefg", *parts])))
    return found


SOURCES = _sources()
each_source = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.module)


def test_every_room_has_files() -> None:
    assert {source.module.split(".")[1] for source in SOURCES if "." in source.module} > {*ROOMS[1:], "training"}
    assert len(SOURCES) == len({source.module for source in SOURCES}) > 150


@each_source
def test_files_and_functions_are_small(source: Source) -> None:
    lines = source.path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 400, f"{source.path} has {len(lines)} lines"
    for node in ast.walk(source.tree()):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert length <= 50, f"{source.path}:{node.lineno}: {node.name} has {length} lines"


@each_source
def test_every_file_says_its_job_first(source: Source) -> None:
    docstring = ast.get_docstring(source.tree())
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


def test_this_checkout_is_tested() -> None:
    assert Path(edgefg.__file__).is_relative_to(ROOT)


def test_child_processes_test_this_checkout(python: Python) -> None:
    result = python("import edgefg; print(edgefg.__file__)")
    assert Path(result.stdout.strip()).is_relative_to(ROOT), result.stdout + result.stderr


def test_import_loads_no_heavy_package(python: Python) -> None:
    heavy = sorted(VENDORS | {"cv2", "cyclopts", "hypothesis", "PIL", "cryptography"})
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
    blocked = ("torch", "torchvision", "onnx", "timm", "nncf", "cyclopts", "safetensors", "PIL")
    result = python(code, TINY / model, blocked=blocked)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() in ("bar", "cross", "disc", "pair")


def test_blocking_torch_works(python: Python) -> None:
    result = python("import torch", blocked=("torch",))
    assert result.returncode == 1
    assert "blocked by the test" in result.stderr


def _says_no_torch(package: str) -> bool:
    """Whether a package's docstring promises it; ``benchmarks/peers`` is no package and promises nothing."""
    source = next((source for source in SOURCES if source.module == package), None)
    return source is not None and "No torch" in (ast.get_docstring(source.tree()) or "")


def _modules_without_torch() -> list[str]:
    """List the modules of the core and of the packages whose docstring says that they need no torch."""
    found = []
    for source in SOURCES:
        package = source.module if source.path.name == "__init__.py" else source.module.rpartition(".")[0]
        if package == "edgefg" or (package != "edgefg.cli" and _says_no_torch(package)):
            found.append(source.module)
    return found


def test_modules_without_torch_import_without_any_vendor(python: Python) -> None:
    modules = _modules_without_torch()
    assert len(modules) > 60
    code = (
        "import importlib\n"
        "for module in sys.argv[1:]:\n"
        "    try:\n        importlib.import_module(module)\n"
        "    except BaseException as error:\n        print(module, repr(error))\n"
    )
    blocked = (*sorted(VENDORS - {"onnx"}), "cv2")
    result = python(code, *modules, blocked=blocked)
    assert (result.stdout, result.stderr, result.returncode) == ("", "", 0)


@pytest.mark.slow
def test_wheel_claims_only_edgefg(tmp_path: Path) -> None:
    tree = tmp_path / "tree"  # a copy: building leaves `build/` behind, and a stale one would be packed
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "runs", "tests", "*.egg-info")
    shutil.copytree(ROOT, tree, ignore=unwanted, symlinks=True)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    result = subprocess.run([*build, str(tree)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"edgefg", f"edgefg-{edgefg.__version__}.dist-info"}
    packed = {name for name in names if name.endswith(".py")}
    inside = [source for source in SOURCES if not str(source.path.relative_to(ROOT)).startswith(NOT_IN_THE_WHEEL)]
    assert packed == {_name_in_wheel(source) for source in inside}
    assert {"edgefg/py.typed", "edgefg/evaluation/page.html.j2"} <= set(names)


def _name_in_wheel(source: Source) -> str:
    path = source.module.replace(".", "/")
    return f"{path}/__init__.py" if source.path.name == "__init__.py" else f"{path}.py"


@pytest.mark.slow
def test_a_checkout_without_links_is_refused(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "edgefg", tree / "edgefg", symlinks=True)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, tree / name)
    link = tree / "edgefg" / "export"
    link.unlink()
    link.write_text("../export", encoding="utf-8")  # what git leaves where it cannot make links
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(tree)]
    result = subprocess.run(build, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "this checkout lost its symbolic links" in result.stdout + result.stderr
