"""One export per network for the whole test run: torch's ONNX exporter takes seconds and most tests repeat its work.

The key is the network itself (its modules, attributes and code) together with the exporter's arguments. The tensors of
the network at hand take the place of those that were exported before the exporter's own optimiser runs, so a test gets
what the exporter would return, but for the numbers in the names of nodes that the optimiser adds. A network that holds
anything without a comparable form is exported directly.
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
import onnx_ir
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
_STORED = "stored."
# Attributes of a module that are compared otherwise.
_ELSEWHERE = {"_parameters", "_buffers", "_modules", "_graph", "_code", "_lineno_map", "_prologue_start"}


class _NotComparable(TypeError):
    """An object without a form that is equal for equal objects only."""


def fingerprint(network: nn.Module, *arguments: Any) -> str:
    """Return a hash that is equal for networks and arguments that export to the same graph but for values of tensors.

    Raises:
        TypeError: the network or an argument holds something without a comparable form.
    """
    digest = hashlib.sha256()
    first: dict[int, str] = {}  # tensors with several names
    _add(digest.update, [first.setdefault(id(value), name) for name, value in _named(network)])
    for name, module in network.named_modules(remove_duplicate=False):
        _add(digest.update, name)
        _add(digest.update, type(module))
        values = {key: value for key, value in vars(module).items() if key not in _ELSEWHERE}
        if isinstance(module, fx.GraphModule):
            _add(digest.update, module.code)
            values = {key: value for key, value in values.items() if isinstance(value, torch.Tensor)}
        else:
            _add(digest.update, type(module).forward)
        _add(digest.update, values)
        for own in (module._parameters, module._buffers):
            _add(digest.update, {key: value if value is None else _form(value) for key, value in own.items()})
    _add(digest.update, arguments)
    return digest.hexdigest()


def _form(value: torch.Tensor) -> tuple[Any, ...]:
    return value.dtype, tuple(value.shape), value.stride(), value.requires_grad


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
    """An exported network in files, with the tensors of another: what `to_graph` reads of torch's `ONNXProgram`."""

    def __init__(self, folder: Path, network: nn.Module) -> None:
        self._folder = folder
        self._tensors = _tensors_of(network)

    @property
    def model_proto(self) -> onnx.ModelProto:
        program = torch.onnx.ONNXProgram(onnx_ir.load(self._folder / "model.onnx"), None)
        _rename(program.model, lambda name: name.removeprefix(_STORED))
        names = self._tensors.keys() & program.model.graph.initializers.keys()
        program.apply_weights({name: self._tensors[name] for name in names})
        program.optimize()
        return program.model_proto

    @property
    def exported_program(self) -> torch.export.ExportedProgram:
        program = torch.export.load(self._folder / "program.pt2")
        for stored in (program.state_dict, program.constants):
            for name in stored.keys() & self._tensors.keys():
                stored[name] = self._tensors[name]
        return program


def _tensors_of(network: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters and buffers, under every name that they have."""
    return {name: _copy(value) for name, value in _named(network)}


def _named(network: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from network.named_parameters(remove_duplicate=False)
    yield from network.named_buffers(remove_duplicate=False)


def _copy(value: torch.Tensor) -> torch.Tensor:
    copied = value.detach().clone()
    return nn.Parameter(copied, value.requires_grad) if isinstance(value, nn.Parameter) else copied


def _store(program: torch.onnx.ONNXProgram | None, network: nn.Module, folder: Path) -> None:
    """Write what `_Stored` reads.

    Raises:
        TypeError: the graph has an initializer that is no tensor of the network, so it may be computed from one.
    """
    assert program is not None
    assert program.exported_program is not None
    if unknown := program.model.graph.initializers.keys() - {name for name, _ in _named(network)}:
        raise _NotComparable(f"{unknown} are not tensors of the network")
    torch.export.save(program.exported_program, folder / "program.pt2")
    _rename(program.model, lambda name: f"{_STORED}{name}")
    onnx.save(program.model_proto, folder / "model.onnx")


def _rename(model: onnx_ir.Model, change: Callable[[str], str]) -> None:
    """Rename the initializers: before the optimiser runs, an operator's result may have the name of one of them."""
    for name, value in list(model.graph.initializers.items()):
        value.name = change(name)


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
                try:
                    _store(export(network, example, **{**options, "optimize": False}), network, into)
                except (
                    Exception
                ):  # of a network that cannot be exported, or an exporter that has to optimise (torch 2.9)
                    return export(network, example, **options)
        return _Stored(into, network)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", stored)
        yield
