from __future__ import annotations

from pathlib import Path

import cv2
import pytest
from msgspec.structs import replace

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
