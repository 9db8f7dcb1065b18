"""Every vendor name that our code uses exists in the vendors' real bindings; the list is read off our source.

TensorRT's bindings import without a GPU once empty libraries satisfy their linker, cuda-python without a driver.
`Reader` follows what annotations say; a vendor's result that is used without one is told, so that no name escapes.
PyCUDA is left out: it has no wheel, and does not build without CUDA's headers.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import ROOT

ROOTS = ("tensorrt", "cuda.bindings")
ROOMS = ("edgefg", "export", "runtimes", "benchmarks")
MUST_USE = {"runtimes/trt.py", "runtimes/cuda.py", "export/build_plan.py"}
# The class of what a call gives besides CUDA's error code, or of an attribute; the bindings' docstrings must agree.
RETURNS = {
    "cuda.bindings.runtime.cudaGetDeviceProperties": "cudaDeviceProp",
    "cuda.bindings.runtime.cudaGetErrorName": "bytes",
    "cuda.bindings.runtime.cudaGetErrorString": "bytes",
    "cuda.bindings.runtime.cudaDeviceProp.name": "bytes",
}

Kinds = frozenset[str]
"""What an expression may be. ``tensorrt.Builder``: that name itself; with ``()``: an instance; ``?…``: a vendor's value
of unknown type; ``[]…``: a container; ``own:C``: an instance of the file's class C; empty: nothing of a vendor's."""
NONE: Kinds = frozenset()


class Found(NamedTuple):
    names: set[str]
    problems: set[str]


def read_names(code: str, file: str = "code.py", *, guarded: bool = True) -> Found:
    """Return the vendor names that a source file uses, or only those that it needs, and where they cannot be told."""
    tree = ast.parse(code)
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.Try) and not guarded):
        if any(handler.type and "AttributeError" in ast.unparse(handler.type) for handler in node.handlers):
            node.body = [ast.Pass()]
    reader = Reader(tree, file)
    for _ in range(4):  # what a later line tells of an earlier one settles after a few turns
        reader.problems.clear()
        reader.parts(reader.tree)
    return Found(reader.names, reader.problems)


def _element(kinds: Kinds) -> Kinds:
    foreign = (kind for kind in kinds if not kind.startswith("own:"))
    return frozenset(kind[2:] if kind.startswith("[]") else f"?{kind.lstrip('?')}" for kind in foreign)


def _container(kinds: Kinds) -> Kinds:
    return frozenset(f"[]{kind}" for kind in kinds)


class Reader:
    """Follows vendor objects through one file, whatever the order of its statements."""

    def __init__(self, tree: ast.Module, file: str) -> None:
        self.tree, self.file = tree, file
        self.names, self.problems = set[str](), set[str]()
        self.scopes: list[object] = [0]
        self.stated: dict[tuple[object, str], Kinds] = {}  # by annotation; the key: scope or class, name
        self.seen: dict[tuple[object, str], Kinds] = {}  # by assignment or call
        self.modules = {"trt": "tensorrt", "rt": "cuda.bindings.runtime"}
        self.classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
        self.owners = {id(part): name for name, node in self.classes.items() for part in node.body}
        self.functions: dict[tuple[str, str], ast.FunctionDef] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                self.functions[self.owners.get(id(node), ""), node.name] = node
            elif isinstance(node, ast.Import | ast.ImportFrom):
                self.read_import(node)

    def read_import(self, node: ast.Import | ast.ImportFrom) -> None:
        for alias in node.names:
            module = node.module if isinstance(node, ast.ImportFrom) else None
            full = f"{module}.{alias.name}" if module else alias.name
            if f"{full}.".startswith(tuple(f"{root}." for root in ROOTS)):
                self.names.add(full)
                bound = alias.asname or (alias.name if module else alias.name.partition(".")[0])
                self.modules[bound] = full if module or alias.asname else bound

    def complain(self, node: ast.expr, what: str) -> None:
        self.problems.add(f"{self.file}:{node.lineno}: {what}: {ast.unparse(node)}")

    def annotated(self, node: ast.expr | None) -> Kinds | None:
        """Return what an annotation says; None where there is none, or where it says nothing."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node = ast.parse(node.value, mode="eval").body
        if node is None or any(isinstance(n, ast.Name) and n.id in ("Any", "object") for n in ast.walk(node)):
            return None
        if isinstance(node, ast.BinOp):
            return (self.annotated(node.left) or NONE) | (self.annotated(node.right) or NONE)
        if isinstance(node, ast.Subscript):
            parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            return _container(NONE.union(*(self.annotated(part) or NONE for part in parts)))
        if isinstance(node, ast.Name) and node.id in self.classes:
            return frozenset({f"own:{node.id}"})
        return frozenset(f"{kind}()" for kind in self.kinds(node))

    def bind(self, key: tuple[object, str], kinds: Kinds) -> None:
        self.seen[key] = self.seen.get(key, NONE) | kinds

    def look_up(self, key: tuple[object, str]) -> Kinds | None:
        return self.stated.get(key, self.seen.get(key))

    def name(self, name: str) -> Kinds:
        for scope in reversed(self.scopes):
            found = self.look_up((scope, name))
            if found or (found is not None and name not in self.modules):
                return found
        return frozenset({self.modules[name]}) if name in self.modules else NONE

    def assign(self, target: ast.expr, kinds: Kinds) -> None:
        if isinstance(target, ast.Name):
            self.bind((self.scopes[-1], target.id), kinds)
        elif isinstance(target, ast.Attribute):
            for kind in self.kinds(target.value):
                if kind.startswith("own:"):
                    self.bind((kind, target.attr), kinds)
                elif not kind.startswith("[]"):
                    self.attribute(target, kind)
        elif isinstance(target, ast.Tuple | ast.List):
            for part in target.elts:
                self.assign(part, _element(kinds))
        elif isinstance(target, ast.Starred):
            self.assign(target.value, _container(kinds))
        else:
            self.kinds(target)

    def statement(self, node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef):
            self.function(node)
        elif isinstance(node, ast.ClassDef):
            for base in node.bases:
                self.bind((f"own:{node.name}", "*base*"), self.kinds(base))
            self.scopes.append(f"own:{node.name}")
            self.parts(node)
            self.scopes.pop()
        elif isinstance(node, ast.AnnAssign):
            self.state(node)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                self.assign(target, self.kinds(node.value))
        elif isinstance(node, ast.For | ast.comprehension):
            self.assign(node.target, _element(self.kinds(node.iter)))
            self.parts(node)
        elif isinstance(node, ast.withitem) and node.optional_vars is not None:
            self.assign(node.optional_vars, _element(self.kinds(node.context_expr)))
        else:
            self.parts(node)

    def parts(self, node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self.kinds(child)
            else:
                self.statement(child)

    def state(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.assign(node.target, self.kinds(node.value))
        said = self.annotated(node.annotation)
        if said is not None and isinstance(node.target, ast.Name):
            self.stated[self.scopes[-1], node.target.id] = said
        elif said is not None and isinstance(node.target, ast.Attribute):
            for kind in self.kinds(node.target.value):
                self.stated[kind, node.target.attr] = said

    def function(self, node: ast.FunctionDef) -> None:
        owner = self.owners.get(id(node))
        if owner and not node.name.startswith("_"):  # a vendor's class calls what we override
            self.names.update(f"{base}.{node.name}" for base in self.look_up((f"own:{owner}", "*base*")) or NONE)
        self.scopes.append(id(node))
        for at, argument in enumerate([*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]):
            said = frozenset({f"own:{owner}"}) if owner and not at else self.annotated(argument.annotation)
            if said is not None:
                self.stated[id(node), argument.arg] = said
        self.annotated(node.returns)
        for part in [*node.args.defaults, *filter(None, node.args.kw_defaults), *node.decorator_list]:
            self.kinds(part)
        self.parts(ast.Module(node.body, []))
        self.scopes.pop()

    def kinds(self, node: ast.expr) -> Kinds:
        """Return what an expression may be, and note the names that it uses."""
        if isinstance(node, ast.Name):
            return self.name(node.id)
        if isinstance(node, ast.Attribute):
            return NONE.union(*(self.attribute(node, kind) for kind in self.kinds(node.value)))
        if isinstance(node, ast.Call):
            return self.call(node)
        if isinstance(node, ast.Subscript):
            self.kinds(node.slice)
            found = self.kinds(node.value)
            return found if isinstance(node.slice, ast.Slice) else _element(found)
        if isinstance(node, ast.NamedExpr):
            self.assign(node.target, self.kinds(node.value))
            return self.kinds(node.value)
        for generator in getattr(node, "generators", ()):
            self.statement(generator)
        if isinstance(node, ast.JoinedStr | ast.Compare | ast.Lambda):
            self.parts(node)
            return NONE
        inside = NONE.union(*(self.kinds(child) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)))
        alike = isinstance(node, ast.IfExp | ast.BoolOp | ast.BinOp | ast.UnaryOp | ast.Starred | ast.Await)
        return inside if alike else _container(inside)

    def attribute(self, node: ast.Attribute, kind: str) -> Kinds:
        if kind.startswith("[]"):  # list.pop, for instance: called, it gives an element
            return frozenset({kind})
        if kind.startswith("?"):
            self.complain(node, "a vendor's result is used, annotate it")
            return NONE
        if kind.startswith("own:"):
            found = self.look_up((kind, node.attr))
            if found is not None or (kind[4:], node.attr) in self.functions:
                return found or NONE
            return NONE.union(*(self.attribute(node, f"{b}()") for b in self.look_up((kind, "*base*")) or NONE))
        name = f"{kind.removesuffix('()')}.{node.attr}"
        self.names.add(name)
        unknown = NONE if RETURNS.get(name) == "bytes" else frozenset({f"?{name}"})
        return unknown if kind.endswith("()") else frozenset({name})

    def call(self, node: ast.Call) -> Kinds:
        given = [(None, self.kinds(argument)) for argument in node.args]
        given += [(keyword.arg, self.kinds(keyword.value)) for keyword in node.keywords]
        vendors = NONE.union(*(kinds for _, kinds in given))
        callee = ast.unparse(node.func)
        if callee in ("getattr", "setattr") and any(not kind.startswith("own:") for kind in vendors):
            self.complain(node, "a vendor's name that cannot be read off, write it as an attribute")
        if "import" in callee and any(ast.unparse(argument)[1:].startswith(ROOTS) for argument in node.args):
            self.complain(node, "a vendor's module that cannot be followed, import it")
        if (own := self.own_function(node.func)) is not None:
            return self.own_call(own, given, vendors)
        if callee in ("next", "min", "max"):
            return _element(vendors)
        if callee in ("list", "tuple", "sorted", "reversed", "iter", "set", "zip", "enumerate"):
            return vendors if callee not in ("zip", "enumerate") else _container(vendors)
        if callee in self.classes:
            return frozenset({f"own:{callee}"})
        return NONE.union(*(self.result(kind) for kind in self.kinds(node.func)))

    def result(self, kind: str) -> Kinds:
        if kind in RETURNS:
            module, given = kind.rpartition(".")[0], RETURNS[kind]
            return NONE if given == "bytes" else frozenset({f"[]{module}.{given}()"})
        if kind.startswith("[]"):
            return frozenset({kind[2:]})
        return NONE if kind.startswith("own:") else frozenset({f"?{kind.lstrip('?')}()"})

    def own_function(self, callee: ast.expr) -> ast.FunctionDef | None:
        if isinstance(callee, ast.Name):
            return self.functions.get(("", callee.id))
        owners = self.kinds(callee.value) if isinstance(callee, ast.Attribute) else NONE
        last = ast.unparse(callee).rpartition(".")[2]
        return next((self.functions.get((kind[4:], last)) for kind in owners if kind.startswith("own:")), None)

    def own_call(self, function: ast.FunctionDef, given: list[tuple[str | None, Kinds]], vendors: Kinds) -> Kinds:
        """Mark the parameters that take a vendor's value and whose annotations say nothing."""
        names = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
        names = names[1:] if id(function) in self.owners else names
        for at, (name, kinds) in enumerate(given):
            if kinds - {*self.modules.values()} and (name or at < len(names)):
                self.bind((id(function), name or names[at]), frozenset({"?a parameter"}))
        said = self.annotated(function.returns)
        # `Any`: what it was given may come out of it again.
        unknown = {f"?{function.name}()"} if self.names else ()
        return said if said is not None else _element(vendors) or frozenset(unknown)


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
    try: pkgutil.resolve_name(name)
    except (AttributeError, ImportError): missing.append(name)
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
