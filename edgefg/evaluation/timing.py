"""Timing of alternatives against each other.

The calls are interleaved, so that a change of the machine's speed affects all of them.
"""

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
    """Time several calls in turns; return the seconds, ``float64 [calls, turns · times]``.

    The order is reversed after each turn, so that no call always follows the same other one.

    Args:
        calls: what to time.
        turns: how many turns each call has.
        times: calls in a row in one turn.
        warm_up: turns before these, which are not timed.
    """
    found = np.empty((len(calls), warm_up + turns, times))
    order = list(range(len(calls)))
    for turn in range(warm_up + turns):
        for number in order:
            for again in range(times):
                start = time.perf_counter()
                calls[number]()
                found[number, turn, again] = time.perf_counter() - start
        order.reverse()
    return found[:, warm_up:].reshape(len(calls), -1)


def in_turn(call: Callable[[_Item], object], items: Iterable[_Item]) -> Callable[[], object]:
    """Return a function that passes the next item to ``call``, starting over after the last."""
    endless = itertools.cycle(items)
    return lambda: call(next(endless))
