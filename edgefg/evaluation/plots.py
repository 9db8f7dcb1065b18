"""Figures of the evaluation page: SVG by matplotlib that takes on the colours of the page.

Text stays text. The colours `_INK` and `_ACCENT` become the page's ``currentColor`` and ``--accent``, so that a figure
suits light and dark pages. matplotlib is imported on the first figure.
"""

from __future__ import annotations

import functools
import io
import re
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from edgefg.metrics import CalibrationBins, IntArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Placeholders, which `_svg` replaces.
_INK, _ACCENT = "#010203", "#040506"
_RIGHT, _WRONG = (0.16, 0.50, 0.86), (0.90, 0.30, 0.12)
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
}
_LONGEST_NAME = 26
# Up to so many classes the cells of a confusion matrix have their counts written in.
_COUNTS_UP_TO = 20


_Plot = TypeVar("_Plot", bound=Callable[..., str])


def _styled(plot: _Plot) -> _Plot:
    """Draw with this module's settings, without changing matplotlib's."""

    @functools.wraps(plot)
    def wrapper(*args: Any, **kwargs: Any) -> str:
        import matplotlib

        with matplotlib.rc_context(_STYLE):
            return plot(*args, **kwargs)

    return cast(_Plot, wrapper)


@_styled
def reliability(bins: CalibrationBins) -> str:
    """Draw accuracy against confidence with the diagonal of perfect calibration, and how many images a bin holds.

    The last bin, of a confidence of exactly 1, counts with the one before.
    """
    count = len(bins.images) - 1
    images = bins.images[:-1].astype(np.float64)
    accuracy = np.nan_to_num(bins.accuracy) * bins.images
    images[-1] += bins.images[-1]
    right = accuracy[:-1].copy()
    right[-1] += accuracy[-1]
    shares = np.divide(right, images, out=np.zeros(count), where=images > 0)
    left = np.arange(count) / count
    figure, (top, below) = _figure(4.2, 4.2, rows=2, heights=(3, 1))
    top.bar(left, shares, 1 / count, align="edge", color=_ACCENT, edgecolor=_INK, linewidth=0.4, alpha=0.75)
    top.plot([0, 1], [0, 1], color=_INK, linestyle="--", linewidth=0.9)
    top.set(xlim=(0, 1), ylim=(0, 1), ylabel="share that is right", xticklabels=[])
    below.bar(left, images, 1 / count, align="edge", color=_ACCENT, edgecolor=_INK, linewidth=0.4, alpha=0.4)
    below.set(xlim=(0, 1), xlabel="confidence", ylabel="images")
    return _svg(figure, "reliability")


@_styled
def risk_coverage(
    curve: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]],
    other: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None = None,
) -> str:
    """Draw risk against coverage, both ``float64 [points]``, and another model's dashed; 5 % risk is marked."""
    figure, (axes,) = _figure(4.2, 4.2)
    highest = max(float(curve[1].max()), 0.1)
    axes.axhline(0.05, color=_INK, linewidth=0.7, linestyle=":")
    axes.plot(*curve, color=_ACCENT, linewidth=1.8, label="this model")
    if other is not None:
        axes.plot(*other, color=_INK, linewidth=1.1, linestyle="--", label="the other model")
        highest = max(highest, float(other[1].max()))
        axes.legend(loc="upper left")
    axes.set(xlim=(0, 1), ylim=(0, min(1.0, 1.08 * highest)))
    axes.set(xlabel="coverage (share of images accepted)", ylabel="risk (errors among the accepted)")
    axes.text(1, 0.05, " 5 %", va="center")
    return _svg(figure, "risk")


@_styled
def confusion(counts: IntArray, names: Sequence[str]) -> str:
    """Draw a confusion matrix: correct predictions in blue, confusions in orange.

    The stronger the colour, the larger the share of the row.

    Args:
        counts: ``int64 [classes, classes]``, row the label, column the prediction.
        names: of the classes.
    """
    size = len(names)
    side = min(12.0, max(3.6, 1.6 + 0.34 * size))
    figure, (axes,) = _figure(side, side)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = np.zeros((size, size, 4))
    image[..., :3] = np.where(np.eye(size, dtype=bool)[..., np.newaxis], _RIGHT, _WRONG)
    # The root lifts single confusions out of the ground.
    image[..., 3] = 0.9 * np.sqrt(shares)
    axes.imshow(image, interpolation="none", extent=(-0.5, size - 0.5, size - 0.5, -0.5))
    fitting = min(9.0, 0.78 * 72 * (side - 2) / size)
    short = [name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…" for name in names]
    axes.set_xticks(range(size), short, rotation=90, fontsize=fitting, parse_math=False)
    axes.set_yticks(range(size), short, fontsize=fitting, parse_math=False)
    axes.tick_params(length=0, pad=2)
    axes.set(xlabel="taken for", ylabel="is")
    grid = np.arange(0.5, size - 1)
    axes.hlines(grid, -0.5, size - 0.5, color=_INK, linewidth=0.25, alpha=0.25)
    axes.vlines(grid, -0.5, size - 0.5, color=_INK, linewidth=0.25, alpha=0.25)
    if size <= _COUNTS_UP_TO:
        for row, column in zip(*np.nonzero(counts), strict=True):
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=9)
    return _svg(figure, "confusion")


def _figure(
    width: float, height: float, *, rows: int = 1, heights: Sequence[float] | None = None
) -> tuple[Figure, list[Axes]]:
    """Make a figure, in inches, without pyplot: no window, no global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, 1, squeeze=False, height_ratios=heights)
    return figure, list(axes[:, 0])


def _svg(figure: Figure, name: str) -> str:
    """Return a figure as an ``<svg>`` element whose ids do not clash with another figure's."""
    import matplotlib

    buffer = io.StringIO()
    # The browser has fonts for what matplotlib's own one lacks.
    with matplotlib.rc_context({"svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format")))
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor").replace(_ACCENT, "var(--accent)")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Names such as axes_1 and patch_2 stand in every figure.
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    # As wide as the page leaves it room for.
    return re.sub(r'width="([\d.]+)pt" height="[\d.]+pt"|height="[\d.]+pt" width="([\d.]+)pt"', "", svg, count=1)
