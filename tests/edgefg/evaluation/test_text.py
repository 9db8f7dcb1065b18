"""An assessment as text."""

from __future__ import annotations

import numpy as np

from edgefg.evaluation.assessment import assess
from edgefg.evaluation.text import PAIRS, percent, render
from tests.edgefg.evaluation.test_assessment import predictions


def test_the_text_has_every_view() -> None:
    mine, other = predictions("ooeec", "oeeec"), predictions("oeeec", "oeeec", "fp32.onnx")
    text = render(
        assess(mine, "trees", other=other, positive=("carp",), unknown=("blanks", np.zeros((2, 3), np.float32)))
    )
    for part in (
        "elm → oak",
        "kingdom",
        "1 images lost",
        "McNemar p = 1",
        "specificity 95 %",
        "2 images in blanks",
        "elm: recall 100.0% → 66.7%",
    ):
        assert part in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_long_lists_are_cut_and_say_so() -> None:
    labels = tuple("abcdefghijklm")
    targets = "".join(labels)
    found = predictions(targets[1:] + "a", targets, labels=labels)._replace(taxonomy=())
    text = render(assess(found, "letters"))
    assert f"({PAIRS} of 13)" in text
    assert text.count(" → ") == PAIRS


def test_nothing_is_a_dash() -> None:
    assert (percent(None), percent(0.5)) == ("-", "50.0%")
