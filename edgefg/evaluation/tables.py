"""Plain text tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Lay rows out in columns: the first aligned to the left, all others, which hold figures, to the right.

    Args:
        rows: column title → cell. The titles are the first row's; a cell that a later row lacks shows as ``-``.

    Returns:
        A line of titles, a rule, and one line per row, without final newline; empty if there are no rows.
    """
    if not rows:
        return ""
    titles = list(rows[0])
    lines = [titles, *([row.get(title, "-") for title in titles] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(titles))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(_line(line, widths) for line in lines)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (
        cell.rjust(width) if column else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join([first, *others]).rstrip()
