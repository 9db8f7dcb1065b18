"""Options that several verbs share."""

from __future__ import annotations

import typing

import pytest
from cyclopts import App, Parameter, ValidationError

from edgefg.cli import options


def shared() -> list[Parameter]:
    """The parameters of the shared options that say what they are for."""
    found = [value for value in vars(options).values() if typing.get_origin(value) is typing.Annotated]
    return [extra for value in found for extra in value.__metadata__ if isinstance(extra, Parameter) and extra.help]


def test_each_is_a_sentence() -> None:
    texts = [extra.help or "" for extra in shared()]
    assert len(texts) >= 8
    assert all(text[0].isupper() and text.endswith(".") for text in texts)


def test_counts_have_a_lower_bound() -> None:
    app = App(result_action="return_value")

    @app.default
    def verb(*, positive: options.Count = 1, natural: options.Natural = 0, maybe: options.OptionalCount = None) -> int:
        return positive + natural + (maybe or 0)

    def call(line: str) -> object:
        return app(line.split(), exit_on_error=False, print_error=False)

    assert call("--positive 2 --natural 0 --maybe 3") == 5
    for line in ("--positive 0", "--natural -1", "--maybe 0"):
        with pytest.raises(ValidationError):
            call(line)
