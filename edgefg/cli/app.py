"""The command line's application: verbs in panels, settings structs as options.

Each thing is written once. An option's help, range and choices stand in its settings struct, a verb's own arguments in
the ``Args:`` of its docstring, and a verb's defaults in its signature:

    @command
    def train(data: Path, /, *, out: Out, training: TrainingConfig = TrainingConfig(image_size=192)) -> None:

Parameters before ``/`` are arguments, those after ``*`` are options. A verb's panel is the name of its module. An
option of the verb itself takes the place of a settings option of the same name, which then keeps its default.

cyclopts does not know msgspec structs, and it loses the default instance of a dataclass as soon as one field is given.
So settings are flattened into plain options before cyclopts sees the verb, and put together again afterwards.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import re
import sys
import typing
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Annotated, Any, TypeVar

import msgspec
from cyclopts import App, CycloptsError, Group, Parameter, UnusedCliTokensError

from edgefg import __version__
from edgefg.errors import DataError
from edgefg.settings.options import options_of, with_options

_Verb = TypeVar("_Verb", bound=Callable[..., None])
# In the order of the work.
_PANELS = {name: Group.create_ordered(name) for name in ("Data", "Train", "Compress", "Export", "Device", "Measure")}
# One object per title: cyclopts refuses two groups of the same name.
_options_panel = functools.cache(Group.create_ordered)


def _default_text(value: Any) -> str | None:
    """Return a default as the help shows it; None if there is nothing to show."""
    if value is None or value is False or value == ():
        return None
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


app = App(
    name="edgefg",
    help="From a fine-grained image classifier to a verified engine on an edge device.",
    version=f"edgefg {__version__}",
    help_format="plaintext",
    group_commands=Group.create_ordered("General"),
    group_parameters=Group.create_ordered("Options"),
    default_parameter=Parameter(negative_iterable=(), show_default=_default_text),
    # Errors and Ctrl-C are for `edgefg.cli.main`.
    print_error=False,
    exit_on_error=False,
    suppress_keyboard_interrupt=False,
    result_action="return_none",
)
app.register_install_completion_command()


def command(verb: _Verb) -> _Verb:
    """Register a verb in the panel of its module."""
    hints = typing.get_type_hints(verb, include_extras=True)
    own = inspect.signature(verb).parameters
    parameters: list[inspect.Parameter] = []
    settings: dict[str, tuple[msgspec.Struct, list[str]]] = {}
    for name, parameter in own.items():
        if isinstance(parameter.default, msgspec.Struct):
            extras = typing.get_args(hints[name])[1:] if typing.get_origin(hints[name]) is Annotated else ()
            left_out = (name for extra in extras if isinstance(extra, Without) for name in extra.names)
            offered = _flatten(parameter.default, {*own, *left_out})
            settings[name] = (parameter.default, [option.name for option in offered])
            parameters += offered
        else:
            parameters.append(parameter.replace(annotation=hints[name]))
    defaults = {one.name: one.default for one in parameters if one.kind == one.KEYWORD_ONLY}

    def flat(*arguments: Any, **given: Any) -> None:
        values = defaults | given
        made = {
            name: with_options(default, **{option: values.pop(option) for option in options})
            for name, (default, options) in settings.items()
        }
        verb(*arguments, **values, **made)

    functools.update_wrapper(flat, verb)
    del flat.__dict__["__wrapped__"]
    # Join the lines of each paragraph and of each entry of Args: terminals have other widths.
    flat.__doc__ = re.sub(r"(?<=[^\n:])\n(?: {8})?(?=\S)", " ", inspect.cleandoc(verb.__doc__ or ""))
    flat.__dict__["__signature__"] = inspect.Signature(parameters)
    flat.__annotations__ = {one.name: one.annotation for one in parameters}
    panel = verb.__module__.rpartition(".")[2].capitalize()
    app.command(flat, group=_PANELS[panel], sort_key=len(list(app)))
    return verb


class Without:
    """Marks a settings parameter: these of its options are not offered, and keep their defaults."""

    def __init__(self, *names: str) -> None:
        self.names = names


def _flatten(settings: msgspec.Struct, taken: Collection[str]) -> list[inspect.Parameter]:
    """Turn the fields of a settings struct and its groups into options, each in the panel of its group."""
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=option.value_in(settings),
            annotation=Annotated[option.type, Parameter(help=option.help, group=_panel_of(settings, option.path))],
        )
        for name, option in options_of(type(settings)).items()
        if name not in taken
    ]


def _panel_of(settings: msgspec.Struct, path: Sequence[str]) -> Group:
    """Return the panel of an option, called like the struct that it is a field of."""
    for name in path[:-1]:
        settings = getattr(settings, name)
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(settings).__name__.removesuffix("Config"))
    group: Group = _options_panel(words.capitalize())
    return group


def usage_error(error: CycloptsError) -> str:
    """Say in one line what is wrong with the arguments, and where to look."""
    text = re.sub(r'^Command "[^"]*" parameter (\S+) requires an argument', r"\1 requires a value", str(error))
    if isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        text = f"Unexpected argument: {error.unused_tokens[0]}."
    verb = " ".join(["edgefg", *(error.command_chain or ())])
    return f"{text} See {verb} --help"


@contextlib.contextmanager
def needs(extra: str) -> Iterator[None]:
    """Name the extra to install if an import fails.

    Raises:
        DataError: a package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as exc:
        raise DataError(
            f"this command needs {exc.name}, which is not installed: pip install 'edgefg[{extra}]'"
        ) from exc
    except ImportError as exc:  # a version that lacks a name, or a library that cannot be loaded
        raise DataError(f"{' '.join(str(exc).split())}. Reinstall: pip install 'edgefg[{extra}]'") from exc


def print_json(value: Any) -> None:
    """Print one line of JSON, in ASCII unless standard output can encode everything."""
    text = msgspec.json.encode(value).decode()
    print(text if sys.stdout.encoding.lower() in ("utf-8", "utf8") else json.dumps(json.loads(text)))
