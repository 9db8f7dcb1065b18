"""Statistics of latencies."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Latencies of one thing measured in several rounds, in milliseconds."""

    count: int
    """Timed predictions of all rounds."""
    p50: float
    p90: float
    p99: float
    mean: float
    minimum: float
    maximum: float
    spread: float
    """(greatest - least median of a round) / median of all: the variation between rounds; 0 for one round."""


def percentile(values: Sequence[float], q: float) -> float:
    """Return the q-th percentile, linearly interpolated between order statistics.

    The sorted values stand at ranks 0 … n-1 and the percentile at rank q/100 · (n-1): type 7 of Hyndman & Fan 1996,
    NumPy's default. With fewer than 100 values p99 lies between the two greatest.

    Args:
        values: at least one number.
        q: 0 to 100.

    Raises:
        ValueError: there are no values, or q lies outside.
    """
    if not values:
        raise ValueError("there is no value to take a percentile of")
    return float(np.percentile(np.asarray(values, np.float64), q, method="linear"))


def summarize_latency(rounds: Sequence[Sequence[float]]) -> Latency:
    """Describe the latencies, in milliseconds, of one or more rounds; each round has at least one."""
    values = [value for round_ in rounds for value in round_]
    median = percentile(values, 50)
    medians = [percentile(round_, 50) for round_ in rounds]
    return Latency(
        count=len(values),
        p50=median,
        p90=percentile(values, 90),
        p99=percentile(values, 99),
        mean=float(np.mean(values)),
        minimum=min(values),
        maximum=max(values),
        spread=(max(medians) - min(medians)) / median if median > 0 else 0.0,
    )
