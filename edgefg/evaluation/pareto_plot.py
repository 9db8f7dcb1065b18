"""Plot of a search: accuracy against latency, with budget, teacher, Pareto front and choice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from edgefg.files import atomic_file

_SHORT, _FULL, _LIMIT = "#7d8b99", "#2b7fdb", "#d9480f"
# Points: in an inch, of the names' font, of a letter's width in it, how far above its point a name lies.
_POINTS, _FONT, _WIDTH = 72, 7, 4.2
_RISES = (4.0, -10.0, 13.0, -19.0, 22.0, -28.0)


class Point(NamedTuple):
    """A trained candidate."""

    name: str
    latency_ms: float
    latency: tuple[float, float]
    """Quartiles, milliseconds."""
    top1: float
    top1_interval: tuple[float, float]
    """Ends of the 95 % interval."""
    full: bool
    """Trained in full, not only for a few epochs."""
    on_front: bool
    chosen: bool


def _name(axes: Any, points: Sequence[Point]) -> None:
    """Write the names beside their points so that none covers another."""
    taken: list[tuple[float, float, int]] = []
    for point in sorted(points, key=lambda point: (not point.chosen, point.latency_ms)):
        place = (point.latency_ms, 100 * point.top1)
        x, y = axes.transData.transform(place) * _POINTS / axes.figure.dpi

        def free(rise: float, x: float = x, y: float = y, length: int = len(point.name)) -> bool:
            return all(
                abs(y + rise - other_y) >= _FONT + 1
                or x >= other_x + _WIDTH * other_length
                or other_x >= x + _WIDTH * length
                for other_x, other_y, other_length in taken
            )

        rise = next(filter(free, _RISES), _RISES[0])
        taken.append((x, y + rise, len(point.name)))
        axes.annotate(
            point.name,
            place,
            textcoords="offset points",
            xytext=(5, rise),
            fontsize=_FONT,
            fontweight="bold" if point.chosen else "normal",
        )


def draw_front(points: Sequence[Point], budget_ms: float, teacher: float, least: float, path: Path) -> None:
    """Write a PNG.

    Args:
        points: the trained candidates; may be empty.
        budget_ms: drawn as a line.
        teacher: top-1 of the teacher, a line as well.
        least: top-1 that the tolerated loss leaves, a dashed line.
        path: the file, replaced as a whole.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 5.2), dpi=130, layout="constrained")
    axes = figure.subplots()
    for kind, colour, marker, label in (
        (False, _SHORT, "o", "short distillation"),
        (True, _FULL, "D", "trained in full"),
    ):
        some = [point for point in points if point.full == kind]
        if not some:
            continue
        x, y = [point.latency_ms for point in some], [100 * point.top1 for point in some]
        across = [[abs(point.latency[end] - point.latency_ms) for point in some] for end in (0, 1)]
        along = [[100 * abs(point.top1_interval[end] - point.top1) for point in some] for end in (0, 1)]
        axes.errorbar(
            x,
            y,
            xerr=across,
            yerr=along,
            fmt=marker,
            color=colour,
            ecolor=colour,
            elinewidth=0.6,
            alpha=0.9,
            label=label,
        )
        front = sorted((point.latency_ms, 100 * point.top1) for point in some if point.on_front)
        axes.step(
            *zip(*front, strict=True), where="post", color=colour, linewidth=1.1, alpha=0.6, label=f"front, {label}"
        )
    for point in points:
        if point.chosen:
            axes.plot(point.latency_ms, 100 * point.top1, "o", markersize=15, fillstyle="none", color=_LIMIT)
    axes.axvline(budget_ms, color=_LIMIT, linewidth=1, label=f"budget {budget_ms:g} ms")
    axes.axhline(100 * teacher, color="#1c2127", linewidth=0.9, label=f"teacher {teacher:.1%}")
    axes.axhline(100 * least, color="#1c2127", linewidth=0.9, linestyle="--", label="tolerated loss")
    axes.set(xlabel="latency, ms (median and quartiles)", ylabel="top-1 on validation data, % (95 % interval)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="best")
    figure.draw_without_rendering()  # so that the places below are those of the finished plot
    _name(axes, [point for point in points if point.on_front or point.full])
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")
