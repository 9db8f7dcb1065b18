"""The fenced blocks of README.md and docs/, with the mark in front of each."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.conftest import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HISTORICAL = "<!-- commands: as recorded -->"
"""Mark of a page whose commands are quoted as they were run and may not exist any more."""
_FENCE = re.compile(r"^(?:<!-- (?P<mark>.*?) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def pyproject() -> dict[str, Any]:
    """The project's pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


class Block(NamedTuple):
    """A fenced block."""

    page: str
    """Path from the repository's root."""
    line: int
    language: str
    mark: str | None
    """Text of the comment before it: ``run``, ``run: slow``, ``run: FILE`` or ``needs: SOMETHING``."""
    code: str

    def __str__(self) -> str:
        """Return where it is."""
        return f"{self.page}:{self.line}"

    def commands(self) -> list[list[str]]:
        """Return the simple commands of a shell block, split into words, without comments."""
        text = self.code.replace("\\\n", " ")
        found = []
        for line in text.splitlines():
            words = shlex.split(line, comments=True)
            while words:
                end = next((i for i, word in enumerate(words) if word in ("&&", "||", "|")), len(words))
                found.append(words[:end])
                words = words[end + 1 :]
        return found


def pages() -> list[Path]:
    """Return the README and every page of the site."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def is_historical(page: Path) -> bool:
    """Return whether the page quotes commands as they were run."""
    return HISTORICAL in page.read_text(encoding="utf-8")


def blocks(*languages: str) -> Iterator[Block]:
    """Yield the blocks of all pages but the historical ones."""
    for page in pages():
        if is_historical(page):
            continue
        text = page.read_text(encoding="utf-8")
        for match in _FENCE.finditer(text):
            if match["language"] in languages:
                line = text.count("\n", 0, match.start("language")) + 1
                name = page.relative_to(ROOT).as_posix()
                yield Block(name, line, match["language"], match["mark"], match["code"])
