"""The plot of a search."""

from __future__ import annotations

from pathlib import Path

import cv2
import pytest
from matplotlib.figure import Figure
from msgspec.structs import replace

from edgefg.export.search import plot
from edgefg.export.search.candidates import ParetoFront, pareto
from edgefg.export.search.plot import plot_front
from tests.export.search.searching import candidate, front

_TRIED = (
    candidate(160, 2.0, 0.895),
    candidate(128, 1.9, 0.89),
    candidate(96, 1.0, 0.7, stage="short"),
    candidate(64, 0.5),
)


@pytest.mark.parametrize(
    "found",
    [
        replace(front(*_TRIED), pareto=tuple(one.name for one in pareto(_TRIED)), chosen=_TRIED[0].name),
        front(*_TRIED),
        front(),
    ],
)
def test_a_front_is_plotted(found: ParetoFront, tmp_path: Path) -> None:
    plot_front(found, tmp_path / "front.png")
    assert cv2.imread(str(tmp_path / "front.png")).shape == (676, 1105, 3)


def test_no_label_covers_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *args: object, **options: object) -> None:
        figures.append(self)
        save(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Figure, "savefig", keep)
    close = (candidate(160, 2.0, 0.895), candidate(128, 2.01, 0.895))
    plot_front(replace(front(*close), pareto=tuple(one.name for one in close)), tmp_path / "front.png")
    places = [text.get_position()[1] for text in figures[0].axes[0].texts]
    assert len(places) == 2
    assert abs(places[0] - places[1]) >= plot._FONT
