"""Timing: the order of the calls, and what is counted."""

from __future__ import annotations

import time

import pytest

from edgefg.evaluation.timing import alternate, in_turn


def test_calls_are_timed_in_turns_there_and_back() -> None:
    order: list[str] = []
    seconds = alternate([lambda: order.append("a"), lambda: order.append("b")], turns=2, warm_up=1)
    assert "".join(order) == "abbaab"
    assert seconds.shape == (2, 2)


def test_several_calls_in_a_turn() -> None:
    order: list[str] = []
    seconds = alternate([lambda: order.append("a"), lambda: order.append("b")], turns=2, times=3, warm_up=0)
    assert "".join(order) == "aaabbbbbbaaa"
    assert seconds.shape == (2, 6)


def test_each_call_has_its_own_time_and_the_warm_up_none() -> None:
    naps = iter([0.05, 0.002, 0.002])
    slow, quick = alternate([lambda: time.sleep(next(naps)), lambda: None], turns=2, warm_up=1)
    assert (slow >= 0.002).all()
    assert slow.max() < 0.05
    assert quick.max() < slow.min()


def test_items_come_one_after_the_other_and_again() -> None:
    call = in_turn(lambda item: item * 2, [1, 2, 3])
    assert [call() for _ in range(5)] == [2, 4, 6, 2, 4]
    with pytest.raises(StopIteration):
        in_turn(lambda item: item, [])()
