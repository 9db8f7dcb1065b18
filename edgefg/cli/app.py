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

app = typer.Typer(
    name="edgefg",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_Function = TypeVar("_Function", bound=Callable[..., None])


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"edgefg {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="show it")] = False,
) -> None:
    """From a fine-grained image classifier to a verified engine on an edge device."""


def command(function: _Function) -> _Function:
    """Register a command; the ``Args:`` of its docstring become the help of its arguments and options.

    A parameter without default is an argument, unless it is annotated as an option; the others are options.
    """
    summary, _, arguments = inspect.cleandoc(function.__doc__ or "").partition("\nArgs:\n")
    helps = {
        match[1]: " ".join(match[2].split())
        for match in re.finditer(r"^    (\w+): (.*(?:\n        .*)*)", arguments, flags=re.MULTILINE)
    }

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except KeyboardInterrupt:
            print("edgefg: interrupted; the same command resumes what can be resumed", file=sys.stderr)
            raise typer.Exit(130) from None

    hints = typing.get_type_hints(function, include_extras=True)
    parameters = []
    for parameter in inspect.signature(function).parameters.values():
        hint = _with_help(hints[parameter.name], parameter, helps[parameter.name])
        parameters.append(parameter.replace(annotation=hint))
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    wrapper.__doc__ = summary
    app.command()(wrapper)
    return function


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
