"""The tree of exceptions, as the module's docstring draws it."""

from __future__ import annotations

import re

from edgefg import errors
from edgefg.errors import DataError, EdgefgError, FrameError, one_line


def _parents() -> dict[str, str]:
    return {
        name: kind.__mro__[1].__name__
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, EdgefgError) and kind is not EdgefgError
    }


def test_the_drawn_tree_is_the_real_one() -> None:
    drawn: dict[str, str] = {}
    above = ["EdgefgError"]
    for line in re.findall(r"^ +[│ ]*[├└]── \w+", errors.__doc__ or "", re.MULTILINE):
        depth = (line.index("──") - 5) // 4 + 1
        name = line.split()[-1]
        drawn[name] = above[depth - 1]
        above[depth:] = [name]
    assert drawn == _parents()


def test_a_wrong_frame_is_also_a_value_error() -> None:
    assert issubclass(FrameError, ValueError)
    assert not issubclass(DataError, ValueError)


def test_a_message_becomes_one_line() -> None:
    assert one_line(RuntimeError("  Check failed:\n\t a == b  \n")) == "Check failed: a == b"
