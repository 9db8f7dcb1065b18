"""One export per network for the whole test run: torch's ONNX exporter takes seconds and most tests repeat its work.

The key is the network itself (its modules, attributes, code and weights) together with the exporter's arguments, so a
test gets what the exporter would return. A network that holds anything without a comparable form is exported directly.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import types
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any

import msgspec
import onnx
import pytest
import torch
from torch import fx, nn

_Update = Callable[[bytes], None]
_PLAIN = (NoneType, bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.export.Dim, Enum)
_NAMED = (type, types.BuiltinFunctionType)
# Kind of object → what tells it from others of its kind.
_PARTS: dict[Any, Callable[[Any], Iterable[Any]]] = {
    (list, tuple): list,
    dict: dict.items,
    (set, frozenset): lambda value: sorted(value, key=repr),
    msgspec.Struct: lambda value: (type(value), msgspec.structs.asdict(value)),
    functools.partial: lambda value: (value.func, value.args, value.keywords),
    types.MethodType: lambda value: (value.__func__,),
    types.FunctionType: lambda value: (
        *(value.__module__, value.__qualname__, value.__defaults__, value.__code__),
        *(cell.cell_contents for cell in value.__closure__ or ()),
    ),
    types.CodeType: lambda value: (value.co_code, value.co_names, value.co_consts),
    nn.Module: lambda value: (),  # a child, which comes by itself
}
# Attributes of a module that are compared otherwise.
_ELSEWHERE = {"_parameters", "_buffers", "_modules", "_graph", "_code", "_lineno_map", "_prologue_start"}


class _NotComparable(TypeError):
    """An object without a form that is equal for equal objects only."""


def fingerprint(network: nn.Module, *arguments: Any) -> str:
    """Return a hash that is equal for networks and arguments that export to the same graph.

    Raises:
        TypeError: the network or an argument holds something without a comparable form.
    """
    digest = hashlib.sha256()
    for name, module in network.named_modules(remove_duplicate=False):
        _add(digest.update, name)
        _add(digest.update, type(module))
        if isinstance(module, fx.GraphModule):
            _add(digest.update, module.code)
        else:
            _add(digest.update, type(module).forward)
            _add(digest.update, {key: value for key, value in vars(module).items() if key not in _ELSEWHERE})
        for own in (module._parameters, module._buffers):
            _add(digest.update, dict(own))
    _add(digest.update, arguments)
    return digest.hexdigest()


def _add(update: _Update, value: Any) -> None:
    update(type(value).__name__.encode())
    if isinstance(value, torch.Tensor):
        update(f"{value.dtype}{tuple(value.shape)}{value.stride()}".encode())
        update(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, _NAMED):
        update(f"{value.__module__}.{value.__qualname__}".encode())
    elif isinstance(value, _PLAIN):
        update(repr(value).encode())
    else:
        parts = next((parts for kind, parts in _PARTS.items() if isinstance(value, kind)), None)
        if parts is None:
            raise _NotComparable(f"{type(value)} has no comparable form")
        for part in parts(value):
            _add(update, part)
    update(b";")


class _Stored:
    """An exported network in files: what `to_graph` reads of torch's `ONNXProgram`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def model_proto(self) -> onnx.ModelProto:
        return onnx.load(self._folder / "model.onnx")

    @property
    def exported_program(self) -> torch.export.ExportedProgram:
        return torch.export.load(self._folder / "program.pt2")


def sharing(folder: Path) -> Iterator[None]:
    """Keep what the exporter returns in a folder, from which all processes of a test run take it."""
    export = torch.onnx.export

    @functools.wraps(export)
    def stored(network: nn.Module, example: tuple[torch.Tensor, ...], **options: Any) -> Any:
        shapes = [(tuple(part.shape), part.dtype) for part in example]
        try:
            into = folder / fingerprint(network, shapes, options)
        except _NotComparable:
            return export(network, example, **options)
        into.mkdir(parents=True, exist_ok=True)
        with (into / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (into / "model.onnx").exists():
                program = export(network, example, **options)
                assert program is not None
                assert program.exported_program is not None
                torch.export.save(program.exported_program, into / "program.pt2")
                onnx.save(program.model_proto, into / "model.onnx")
        return _Stored(into)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", stored)
        yield
