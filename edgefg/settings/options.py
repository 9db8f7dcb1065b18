"""Options: the fields of a settings struct, its groups flattened. The command line and its help are made from them."""

from __future__ import annotations

import functools
import itertools
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin

import msgspec

from edgefg.errors import DataError

_Settings = TypeVar("_Settings", bound=msgspec.Struct)


class Option(NamedTuple):
    """One field of a settings struct or of one of its groups; names are unique across the groups of a struct."""

    name: str
    """The field's name, or the singular that its ``Meta(extra={"option": ...})`` states for a list."""
    path: tuple[str, ...]
    """The groups that lead to the field, and the field itself."""
    type: Any
    """Without constraints."""
    help: str
    """The field's description."""
    choices: tuple[Any, ...]
    """The allowed values, where the type lists them."""

    @property
    def flag(self) -> str:
        """The option's name on the command line."""
        return f"--{self.name.replace('_', '-')}"

    def value_in(self, settings: msgspec.Struct) -> Any:
        """Return the option's value in a settings struct."""
        value: Any = settings
        for field in self.path:
            value = getattr(value, field)
        return value


@functools.cache
def options_of(settings: type[msgspec.Struct]) -> Mapping[str, Option]:
    """List the options of a settings struct by name, those of its groups included."""
    hints, types = typing.get_type_hints(settings, include_extras=True), typing.get_type_hints(settings)
    found: dict[str, Option] = {}
    for name in settings.__struct_fields__:
        hint = hints[name]
        base, *extras = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if isinstance(base, type) and issubclass(base, msgspec.Struct):
            inner = options_of(base).values()
            found |= {option.name: option._replace(path=(name, *option.path)) for option in inner}
            continue
        metas = [extra for extra in extras if isinstance(extra, msgspec.Meta)]
        text = next((meta.description for meta in metas if meta.description), "")
        option = next((meta.extra["option"] for meta in metas if meta.extra), name)
        choices = get_args(base) if get_origin(base) is Literal else ()
        found[option] = Option(option, (name,), types[name], text, choices)
    return found


def with_options(settings: _Settings, **values: Any) -> _Settings:
    """Return settings with some options changed, whichever group they belong to.

    Raises:
        DataError: there is no such option, or a value is out of range.
    """
    options = options_of(type(settings))
    tree = msgspec.to_builtins(settings)
    for name, value in values.items():
        if name not in options:
            raise DataError(f"{type(settings).__name__} has no option {name!r}. Use one of {', '.join(options)}")
        group = tree
        *parents, field = options[name].path
        for parent in parents:
            group = group[parent]
        group[field] = value
    try:
        return msgspec.convert(tree, type(settings))
    except msgspec.ValidationError as exc:
        reason, _, path = str(exc).partition(" - at `$.")
        fields = tuple(re.sub(r"\[.*?\]|`", "", path).split("."))
        option = next((one for one in options.values() if one.path == fields), None)
        if option is None:  # a check over several options names them itself
            raise DataError(reason) from exc
        given = f"{option.flag} {values.get(option.name, option.value_in(settings))!r}"
        if option.choices:
            raise DataError(f"{given} is not a choice. Use one of {', '.join(map(str, option.choices))}") from exc
        raise DataError(f"{given} is out of range: {reason}") from exc


def differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield name and both values of each leaf that differs between two settings, given by `msgspec.to_builtins`.

    An element of a list has the list's name; what one side lacks is None.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old | new:
            yield from differences(old.get(key), new.get(key), key)
    elif isinstance(old, list | tuple) and isinstance(new, list | tuple):
        for pair in itertools.zip_longest(old, new):
            yield from differences(*pair, name)
    elif old != new:
        yield name, old, new
