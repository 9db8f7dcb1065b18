"""Tables: alignment, missing cells, nothing."""

from __future__ import annotations

from edgefg.evaluation.tables import table


def test_the_first_column_is_left_all_others_right() -> None:
    text = table([{"class": "oak", "images": "7"}, {"class": "sycamore", "images": "1234"}])
    assert text.splitlines() == [
        "class     images",
        "--------  ------",
        "oak            7",
        "sycamore    1234",
    ]


def test_a_missing_cell_is_a_dash_and_no_line_ends_in_spaces() -> None:
    assert table([{"a": "x", "b": "1"}, {"a": "y"}, {"a": ""}]).splitlines()[3:] == ["y  -", "   -"]
    assert table([{"only": "x"}]).splitlines() == ["only", "----", "x"]


def test_no_rows_no_table() -> None:
    assert table([]) == ""
