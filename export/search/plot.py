"""Plot of a search: top-1 against latency, with the Pareto front, the teacher, the limits and the choice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from edgefg.export.search.candidates import Candidate, ParetoFront, Stage
from edgefg.files import atomic_file

_LIMIT, _TEACHER = "#d9480f", "#1c2127"
_STYLES: dict[Stage, tuple[str, str, str]] = {
    "short": ("#7d8b99", "o", "short distillation"),
    "full": ("#2b7fdb", "D", "trained in full"),
}
# In points: an inch, the size of the labels' font, the width of a letter, and offsets of labels above their points.
_INCH, _FONT, _LETTER = 72, 7, 4.2
_OFFSETS = (4.0, -10.0, 13.0, -19.0, 22.0, -28.0)


def plot_front(front: ParetoFront, path: Path) -> None:
    """Write a PNG file, completely or not at all."""
    figure = Figure(figsize=(8.5, 5.2), dpi=130, layout="constrained")
    axes = figure.subplots()
    for stage in _STYLES:
        _plot_stage(axes, front, stage)
    trained = [one for one in front.candidates if one.accuracy is not None]
    for one in trained:
        if one.name == front.chosen:
            axes.plot(*_place(one), "o", markersize=15, fillstyle="none", color=_LIMIT)
    teacher = 100 * front.teacher.top1
    axes.axvline(front.budget_ms, color=_LIMIT, linewidth=1, label=f"budget {front.budget_ms:g} ms")
    axes.axhline(teacher, color=_TEACHER, linewidth=0.9, label=f"teacher {teacher:.1f} %")
    axes.axhline(teacher - front.max_drop, color=_TEACHER, linewidth=0.9, linestyle="--", label="largest loss")
    axes.set(xlabel="latency, ms (median and quartiles)", ylabel="top-1 on validation data, % (95 % interval)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="best")
    figure.draw_without_rendering()  # labels are placed by the final scales
    labelled = [one for one in trained if one.name in front.pareto or one.stage == "full"]
    _label(axes, sorted(labelled, key=lambda one: (one.name != front.chosen, one.latency_ms)), front.chosen)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")


def _place(candidate: Candidate) -> tuple[float, float]:
    assert candidate.accuracy is not None
    return candidate.latency_ms, 100 * candidate.accuracy.top1


def _plot_stage(axes: Axes, front: ParetoFront, stage: Stage) -> None:
    """Plot the candidates of a stage with their intervals, and their Pareto front."""
    colour, marker, label = _STYLES[stage]
    found = [one for one in front.candidates if one.stage == stage]
    if not found:
        return
    x, y = zip(*map(_place, found), strict=True)
    quartiles = zip(*((one.latency_low_ms, one.latency_high_ms) for one in found), strict=True)
    intervals = zip(*((one.accuracy.top1_low, one.accuracy.top1_high) for one in found if one.accuracy), strict=True)
    axes.errorbar(
        x,
        y,
        xerr=[[abs(end - middle) for end, middle in zip(ends, x, strict=True)] for ends in quartiles],
        yerr=[[abs(100 * end - middle) for end, middle in zip(ends, y, strict=True)] for ends in intervals],
        fmt=marker,
        color=colour,
        elinewidth=0.6,
        alpha=0.9,
        label=label,
    )
    if steps := sorted(_place(one) for one in found if one.name in front.pareto):
        axes.step(
            *zip(*steps, strict=True), where="post", color=colour, linewidth=1.1, alpha=0.6, label=f"front, {label}"
        )


def _label(axes: Axes, candidates: Sequence[Candidate], chosen: str | None) -> None:
    """Write names beside points, each where it covers no earlier one."""
    taken: list[tuple[float, float, int]] = []
    for one in candidates:
        x, y = axes.transData.transform(_place(one)) * _INCH / axes.figure.dpi

        def is_free(offset: float, x: float = x, y: float = y, length: int = len(one.name)) -> bool:
            return all(
                abs(y + offset - other_y) >= _FONT + 1
                or x >= other_x + _LETTER * other_length
                or other_x >= x + _LETTER * length
                for other_x, other_y, other_length in taken
            )

        offset = next(filter(is_free, _OFFSETS), _OFFSETS[0])
        taken.append((x, y + offset, len(one.name)))
        axes.annotate(
            one.name,
            _place(one),
            textcoords="offset points",
            xytext=(5, offset),
            fontsize=_FONT,
            fontweight="bold" if one.name == chosen else "normal",
        )
