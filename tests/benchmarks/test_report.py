from __future__ import annotations

from edgefg.benchmarks.report import megabytes, top1_text
from edgefg.evaluation.tables import table
from edgefg.metrics import Scores


def test_columns_are_aligned() -> None:
    rows = [{"model": "teacher", "p50 ms": "12.25"}, {"model": "s", "p50 ms": "3.5"}, {"model": "no figure"}]
    assert table(rows).splitlines() == [
        "model      p50 ms",
        "---------  ------",
        "teacher     12.25",
        "s             3.5",
        "no figure       -",
    ]


def test_no_row_no_table() -> None:
    assert table([]) == ""


def test_figures_for_people() -> None:
    scores = Scores(
        images=10, top1=0.8, top1_low=0.4902, top1_high=0.9433, top5=1, balanced=1, macro_f1=1, ece=0, aurc=0,
        coverage_at_5_risk=1, nll=0,
    )  # fmt: skip
    assert top1_text(scores) == "80.0% [49.0%, 94.3%]"
    assert megabytes(1_234_567) == "1.23"
    assert megabytes(None) == "-"
