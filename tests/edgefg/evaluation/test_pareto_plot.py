"""The plot of a search."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from edgefg.evaluation import pareto_plot
from edgefg.evaluation.pareto_plot import Point, draw_front
from edgefg.image_io import read_image


def point(name: str, latency_ms: float, top1: float, **flags: bool) -> Point:
    flags = {"full": False, "on_front": True, "chosen": False} | flags
    return Point(name, latency_ms, (latency_ms - 0.1, latency_ms + 0.1), top1, (top1 - 0.02, top1 + 0.02), **flags)


POINTS = [
    point("small", 1.0, 0.80),
    point("medium", 1.02, 0.801, full=True, chosen=True),
    point("large", 3.0, 0.9, full=True),
    point("beaten", 3.5, 0.7, on_front=False),
]


@pytest.mark.parametrize("points", [[], POINTS[:1], POINTS])
def test_a_png_is_written(points: list[Point], tmp_path: Path) -> None:
    draw_front(points, 2.0, 0.93, 0.92, tmp_path / "front.png")
    assert read_image(tmp_path / "front.png").std() > 1
    assert len(list(tmp_path.iterdir())) == 1


def test_what_is_named_and_that_no_name_covers_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *args: object, **options: object) -> None:
        figures.append(self)
        save(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Figure, "savefig", keep)
    draw_front(POINTS, 2.0, 0.93, 0.92, tmp_path / "front.png")
    texts = figures[0].axes[0].texts
    assert sorted(text.get_text() for text in texts) == ["large", "medium", "small"]
    places = {text.get_text(): text.get_position()[1] for text in texts}
    assert abs(places["small"] - places["medium"]) >= pareto_plot._FONT
    legend = figures[0].axes[0].get_legend()
    assert legend is not None
    labels = [text.get_text() for text in legend.get_texts()]
    assert {"budget 2 ms", "teacher 93.0%", "front, trained in full"} <= set(labels)
