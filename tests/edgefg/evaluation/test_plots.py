"""The page's figures: their numbers, names and ids."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import pytest

from edgefg.evaluation import plots
from edgefg.metrics import calibration_bins


def test_bars_of_the_reliability_diagram() -> None:
    # 15 bins on 0…1: only the last has images, one of confidence 0.95 (right) and one of exactly 1 (wrong).
    svg = plots.reliability(calibration_bins(np.array([0.95, 1.0]), np.array([True, False])))
    paths = [
        [float(value) for value in re.findall(r"-?[\d.]+", element.get("d") or "")]
        for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}path")
        if "var(--accent)" in (element.get("style") or "") and "opacity: 0.75" in (element.get("style") or "")
    ]
    heights = [max(path[1::2]) - min(path[1::2]) for path in paths]
    axis = re.search(r'<rect x="[\d.]+" y="[\d.]+" width="[\d.]+" height="([\d.]+)"', svg)
    assert axis is not None
    assert len(heights) == 15
    assert heights[:14] == [0.0] * 14
    assert heights[14] == pytest.approx(float(axis[1]) / 2, abs=0.01)


def _texts(svg: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_the_other_model_s_curve_is_drawn_and_named_only_if_there_is_one() -> None:
    curve = np.array([0.5, 1.0]), np.array([0.0, 0.2])
    other = np.array([0.5, 1.0]), np.array([0.1, 0.4])
    assert "the other model" not in _texts(plots.risk_coverage(curve))
    both = plots.risk_coverage(curve, other)
    assert {"this model", "the other model"} <= set(_texts(both))


def test_a_confusion_matrix_has_its_names_and_counts() -> None:
    counts = np.array([[7, 2], [0, 13]])
    texts = _texts(plots.confusion(counts, ["oak", "an elm whose name is much too long for an axis"]))
    assert {"oak", "7", "2", "13"} <= set(texts)
    assert "0" not in texts
    assert any(text.startswith("an elm whose") and text.endswith("…") for text in texts)


def test_large_matrices_have_no_counts() -> None:
    assert not {"41", "42"} & set(
        _texts(plots.confusion(41 * np.eye(21, dtype=np.int64), [f"c{i}" for i in range(21)]))
    )


def test_settings_of_matplotlib_do_not_change() -> None:
    before = dict(matplotlib.rcParams)
    plots.risk_coverage((np.array([1.0]), np.array([0.1])))
    assert dict(matplotlib.rcParams) == before
