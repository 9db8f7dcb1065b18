from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from edgefg.errors import DataError
from edgefg.export.search.candidates import (
    Student,
    closest,
    most_accurate,
    pareto,
    parse_budget,
    render,
    search_space,
    select_finalists,
    shortlist,
)
from edgefg.settings.search import SearchConfig
from tests.export.search.searching import candidate, front


@pytest.mark.parametrize(
    ("text", "ms"), [("3ms", 3.0), ("3", 3.0), (" 0.5 s ", 500.0), ("800us", 0.8), ("800µs", 0.8), (".5ms", 0.5)]
)
def test_budgets(text: str, ms: float) -> None:
    assert parse_budget(text) == pytest.approx(ms)


@pytest.mark.parametrize("text", ["", "ms", "-3ms", "0ms", "3 min", "3ms per frame", "nan"])
def test_other_texts_are_not_budgets(text: str) -> None:
    with pytest.raises(DataError, match=r"is not a latency\. Give one such as 3ms"):
        parse_budget(text)


def test_students() -> None:
    assert Student.parse("net") == Student(backbone="net", weights="hub")
    assert Student.parse("net=a=b.pth") == Student(backbone="net", weights="a=b.pth")
    with pytest.raises(DataError, match="--student '=none' does not name a backbone"):
        Student.parse("=none")


def test_the_search_space_has_all_combinations() -> None:
    space = search_space(SearchConfig(students=("net",), sizes=(160, 128), macs=(1.0, 0.5)), 224)
    assert [one.name for one in space] == ["net-160", "net-160-macs50", "net-128", "net-128-macs50"]
    assert [one.unpruned_name for one in space] == ["net-160", "net-160", "net-128", "net-128"]


def test_default_sizes_follow_from_the_teacher() -> None:
    assert [one.size for one in search_space(SearchConfig(macs=(1.0,)), 224)] == [224, 192, 160, 128]
    assert [one.size for one in search_space(SearchConfig(macs=(1.0,)), 48)] == [48, 32]


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"students": ()}, "there is no --student. Give at least one"),
        ({"macs": (1.0, 1.0)}, "a --macs was given twice"),
        ({"sizes": (160, 160)}, "a --size was given twice"),
        ({"precisions": ("int8", "int8")}, "a --precision was given twice"),
        ({"students": ("net", "net=none")}, "several architectures are called net-224"),
        ({"students": ("hub/net", "hub:net")}, "several architectures are called hub-net-224"),
        ({"macs": (0.7, 0.701)}, "several architectures are called tf_efficientnet_lite0-224-macs70"),
    ],
)
def test_search_spaces_that_are_refused(changed: dict[str, Any], complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        search_space(replace(SearchConfig(), **changed), 224)


figures = st.lists(st.tuples(st.floats(0.1, 10), st.floats(0, 1)), min_size=1, max_size=12)


@given(figures)
def test_nothing_dominates_the_pareto_front(points: list[tuple[float, float]]) -> None:
    every = [candidate(number + 16, *point) for number, point in enumerate(points)]
    found = pareto(every)
    for one, (latency, top1) in zip(every, points, strict=True):
        dominated = any(fast <= latency and good >= top1 and (fast, good) != (latency, top1) for fast, good in points)
        assert (one in found) == (not dominated)
    assert [one.latency_ms for one in found] == sorted(one.latency_ms for one in found)
    assert most_accurate(every) in found


def test_a_short_training_is_not_compared_with_a_full_one() -> None:
    short, full = candidate(160, 2.0, 0.5, stage="short"), candidate(128, 1.0, 0.9)
    assert pareto([short, full, candidate(64, 0.5)]) == [full, short]


def test_the_slowest_within_the_budget_are_distilled_and_the_best_of_them_trained() -> None:
    untrained = [candidate(size, size / 100) for size in (400, 300, 200, 100)]
    also_fast = replace(untrained[0], precision="fp32", latency_ms=2.9)
    assert [one.size for one in shortlist([*untrained, also_fast], 3.0, 3)] == [300, 400, 200]
    assert shortlist(untrained, 0.5, 3) == []
    short = [candidate(300, 3.1, 0.9), candidate(200, 2.0, 0.7), candidate(100, 1.0, 0.7), candidate(64, 0.9, 0.6)]
    assert [one.size for one in select_finalists(short, 3.0, 2)] == [100, 200]


def test_feasible_and_closest_candidates() -> None:
    fits, slow, poor = candidate(160, 2.0, 0.895), candidate(224, 3.3, 0.9), candidate(96, 1.0, 0.7)
    found = front(fits, slow, poor)
    assert [found.is_feasible(one) for one in found.candidates] == [True, False, False]
    assert closest(front(slow, poor)) == slow
    assert closest(front(candidate(96, 9.0), candidate(64, 5.0))) == candidate(64, 5.0)
    assert closest(front()) is None
    assert "no candidate is feasible. The closest is net-224 int8 (full) with 3.30 ms and +0.0 points" in render(
        front(slow, poor)
    )
    assert "none was trained. The fastest is net-64 int8 with 5.00 ms" in render(front(candidate(64, 5.0)))
    assert "← chosen" in render(replace(found, chosen=fits.name))


def test_a_candidate_that_could_not_be_trained_is_not_called_too_slow() -> None:
    told = render(replace(front(candidate(64, 1.0)), skipped=("net-64 (full): the loss is not finite",)))
    assert "no candidate within the budget could be trained and exported. See which were skipped" in told
    assert "skipped: net-64 (full): the loss is not finite" in told


def test_feasible_short_trials_and_gates_that_do_not_hold_are_named() -> None:
    tried = candidate(64, 1.0, 0.9, stage="short")
    assert "but net-64 int8 is after its short distillation. Raise --finalists" in render(front(tried))
    # A candidate that is as close but for the gate does not hide it.
    refused = candidate(96, 0.5, 0.9, failures=("a class loses more",))
    assert "net-64 int8 is after its short distillation" in render(front(refused, tried))
    told = render(front(refused))
    assert "keeps the budget and --max-drop, but not the gate: a class loses more." in told
    assert "gate: net-96 int8 (full): a class loses more" in told
