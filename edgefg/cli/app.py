"""The Typer application, and how a command's docstring becomes its help."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import logging
import re
import sys
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, TypeVar

import msgspec
import typer
from typer.models import OptionInfo

from edgefg import __version__
from edgefg.errors import DataError
from edgefg.progress import T, progress_shown_by
from edgefg.settings.options import Option, options_of, with_options

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


class Only:
    """Restricts a settings parameter to some of its struct's options or groups."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def offers(self, option: Option) -> bool:
        """Whether an option, or the group that it belongs to, is one of the names."""
        return not set(option.path).isdisjoint(self.names)


class Except(Only):
    """Leaves some options or groups of a settings parameter out."""

    def offers(self, option: Option) -> bool:
        """Whether neither the option nor its group is one of the names."""
        return not super().offers(option)


def command(function: _Function) -> _Function:
    """Register a command; the ``Args:`` of its docstring become the help of its arguments and options.

    A parameter without default is an argument, unless it is annotated as an option; the others are options. A parameter
    whose type is a settings struct becomes one option for each of `options_of` it; their defaults are those of the
    parameter's default.
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
                given[name] = with_options(default, **{field: given.pop(field) for field in fields})
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


def _is_struct(hint: Any) -> bool:
    base = typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint
    return isinstance(base, type) and issubclass(base, msgspec.Struct)


def _options_of(hint: Any, default: Any) -> list[inspect.Parameter]:
    """Turn the options of a settings parameter into parameters of their own."""
    found = []
    for option in offered_options(hint):
        choices = "|".join(option.choices)
        text = f"{choices}: {option.help}" if choices else option.help
        kind = str if choices else option.type
        flag, value = option.flag, option.value_in(default)
        if typing.get_origin(kind) is tuple:
            kind, value = list[str], list(value)
        if kind == bool | None or (kind is bool and value):
            flag = f"{flag}/--no-{flag.removeprefix('--')}"
        found.append(
            inspect.Parameter(
                option.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=value,
                annotation=Annotated[kind, typer.Option(flag, help=text)],
            )
        )
    return found


def offered_options(hint: Any) -> list[Option]:
    """List the options of a settings parameter that are on the command line."""
    base, *rules = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
    return [option for option in options_of(base).values() if all(rule.offers(option) for rule in rules)]


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


@contextlib.contextmanager
def console() -> Iterator[None]:
    """Show log messages on standard error, and progress bars if it is a terminal."""
    logger, handler = logging.getLogger("edgefg"), logging.StreamHandler(sys.stderr)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with progress_shown_by(_progress_bar) if sys.stderr.isatty() else contextlib.nullcontext():
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _progress_bar(items: Iterable[T], description: str, total: int | None) -> Iterable[T]:
    try:
        from tqdm import tqdm
    except ImportError:  # it comes with edgefg[train]
        return items
    bar: Iterable[T] = tqdm(items, description, total, leave=False)
    return bar
