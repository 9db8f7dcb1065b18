"""Times several things against each other: turns alternate, so that a machine that gets slower does so for all."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

_Item = TypeVar("_Item")


def alternate(
    calls: Sequence[Callable[[], object]], *, turns: int, times: int = 1, warm_up: int = 1
) -> npt.NDArray[np.float64]:
    """Call each one some times in turn, again and again; return the seconds, ``float64 [calls, turns · times]``.

    Args:
        calls: what to time.
        turns: how often it is each one's turn.
        times: calls in a row of one turn.
        warm_up: turns before these, which are not timed.
    """
    found = np.empty((len(calls), warm_up + turns, times))
    for turn in range(warm_up + turns):
        for number, call in enumerate(calls):
            for again in range(times):
                start = time.perf_counter()
                call()
                found[number, turn, again] = time.perf_counter() - start
    return found[:, warm_up:].reshape(len(calls), -1)


def in_turn(call: Callable[[_Item], object], items: Iterable[_Item]) -> Callable[[], object]:
    """Return what calls ``call`` with one item after the other, again and again."""
    endless = itertools.cycle(items)
    return lambda: call(next(endless))
