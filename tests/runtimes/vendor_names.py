"""Reads off a source file which names of TensorRT and CUDA it uses, by `ast` and its annotations.

A vendor's result that is used without an annotation is told, so that no name escapes.
"""

from __future__ import annotations

import ast
from typing import NamedTuple

ROOTS = ("tensorrt", "cuda.bindings")
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
        self.names: set[str] = set()
        self.problems: set[str] = set()
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
        given: list[tuple[str | None, Kinds]] = [(None, self.kinds(argument)) for argument in node.args]
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
