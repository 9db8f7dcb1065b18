"""The Typer application, and how a command's docstring becomes its help."""

from __future__ import annotations

import copy
import functools
import inspect
import re
import sys
import typing
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import msgspec
import typer
from typer.models import OptionInfo

from edgefg import __version__
from edgefg.errors import DataError
from edgefg.settings.training import choices_of

app = typer.Typer(
    name="edgefg",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_Function = TypeVar("_Function", bound=Callable[..., None])
_Settings = TypeVar("_Settings", bound=msgspec.Struct)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"edgefg {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="show it")] = False,
) -> None:
    """From a fine-grained image classifier to a verified engine on an edge device."""


class Only:
    """Marks a parameter that is a settings struct: only these of its fields become options."""

    def __init__(self, *names: str) -> None:
        self.names = names


def command(function: _Function) -> _Function:
    """Register a command; the ``Args:`` of its docstring become the help of its arguments and options.

    A parameter without default is an argument, unless it is annotated as an option; the others are options. A parameter
    whose type is a struct of settings becomes one option a field, with the field's description as help and the value
    in the parameter's default as default.
    """
    summary, _, arguments = inspect.cleandoc(function.__doc__ or "").partition("\nArgs:\n")
    helps = {
        match[1]: " ".join(match[2].split())
        for match in re.finditer(r"^    (\w+): (.*(?:\n        .*)*)", arguments, flags=re.MULTILINE)
    }
    hints = typing.get_type_hints(function, include_extras=True)
    parameters: list[inspect.Parameter] = []
    settings: dict[str, tuple[Any, list[str]]] = {}
    for parameter in inspect.signature(function).parameters.values():
        hint = hints[parameter.name]
        if _is_struct(hint):
            options = _options_of(hint, parameter.default)
            settings[parameter.name] = (parameter.default, [option.name for option in options])
            parameters += options
        else:
            parameters.append(parameter.replace(annotation=_with_help(hint, parameter, helps[parameter.name])))

    @functools.wraps(function)
    def wrapper(**given: Any) -> None:
        try:
            for name, (default, fields) in settings.items():
                given[name] = checked(default, **{field: given.pop(field) for field in fields})
            function(**given)
        except KeyboardInterrupt:
            print("edgefg: interrupted; the same command resumes what can be resumed", file=sys.stderr)
            raise typer.Exit(130) from None

    order = sorted(parameters, key=lambda parameter: parameter.default is not inspect.Parameter.empty)
    keyword = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in order]
    wrapper.__signature__ = inspect.Signature(keyword)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    wrapper.__doc__ = summary
    app.command()(wrapper)
    return function


def checked(settings: _Settings, **values: Any) -> _Settings:
    """Return settings with some fields changed. Raises `DataError` where a value is out of range."""
    try:
        return msgspec.convert({**msgspec.structs.asdict(settings), **values}, type(settings))
    except msgspec.ValidationError as exc:
        reason, _, path = str(exc).partition(" - at `$.")
        field = path.rstrip("`")
        named = f"--{field.replace('_', '-')} {values.get(field)!r}" if field else "an option"
        if choices := choices_of(type(settings), field):
            raise DataError(f"{named}: no such choice; needed one of {', '.join(map(str, choices))}") from exc
        raise DataError(f"{named} is out of range: {reason}") from exc


def _is_struct(hint: Any) -> bool:
    base = typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint
    return isinstance(base, type) and issubclass(base, msgspec.Struct)


def _options_of(hint: Any, default: Any) -> list[inspect.Parameter]:
    """Turn the fields of a settings struct into parameters."""
    base, *extras = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
    only = next((extra.names for extra in extras if isinstance(extra, Only)), base.__struct_fields__)
    types, hints = typing.get_type_hints(base), typing.get_type_hints(base, include_extras=True)
    found = []
    for name in only:
        kind, meta = types[name], getattr(hints[name], "__metadata__", ())
        text = next((m.description for m in meta if isinstance(m, msgspec.Meta) and m.description), "")
        if typing.get_origin(kind) is typing.Literal:
            text = f"{'|'.join(typing.get_args(kind))}: {text}"
            kind = str
        option = typer.Option(f"--{name.replace('_', '-')}", help=text)
        found.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=getattr(default, name),
                annotation=Annotated[kind, option],
            )
        )
    return found


def _with_help(hint: Any, parameter: inspect.Parameter, text: str) -> Any:
    base, *extras = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
    for extra in extras:
        if isinstance(extra, OptionInfo):  # shared by several commands, so each gets a copy with its own help
            option = copy.copy(extra)
            option.help = text
            return Annotated[base, option]
    if parameter.default is inspect.Parameter.empty:
        return Annotated[base, typer.Argument(help=text)]
    flag = [f"--{parameter.name.replace('_', '-')}"] if base is bool else []
    return Annotated[base, typer.Option(*flag, help=text)]


Count = Annotated[int, typer.Option(min=1)]
"""A whole number from 1."""
MaybeCount = Annotated[int | None, typer.Option(min=1)]
"""A whole number from 1, or left out."""


def print_json(value: Any) -> None:
    """Print one line of JSON."""
    print(msgspec.json.encode(value).decode())


def needs(extra: str, error: ImportError) -> DataError:
    """Say in one line which extra brings a package that is not installed."""
    return DataError(f"this command needs {error.name}, which is not installed: pip install 'edgefg[{extra}]'")


def say(line: str) -> None:
    """Tell a person what begins, on standard error."""
    print(f"== {line}", file=sys.stderr, flush=True)
