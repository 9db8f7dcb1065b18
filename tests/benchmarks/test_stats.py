from __future__ import annotations

import pytest

from edgefg.benchmarks.stats import percentile, summarize_latency


def test_percentiles_by_hand() -> None:
    values = [40.0, 10.0, 20.0, 30.0]  # ranks 0 … 3
    assert percentile(values, 0) == 10
    assert percentile(values, 50) == 25
    assert percentile(values, 90) == pytest.approx(37)  # rank 2.7
    assert percentile(values, 99) == pytest.approx(39.7)  # rank 2.97
    assert percentile([7.0], 99) == 7


def test_summary_of_rounds_by_hand() -> None:
    latency = summarize_latency([[1.0, 2.0, 3.0], [4.0, 5.0, 9.0]])
    assert (latency.count, latency.p50, latency.mean) == (6, 3.5, 4.0)
    assert (latency.minimum, latency.maximum) == (1.0, 9.0)
    assert latency.p90 == pytest.approx(7.0)
    assert latency.spread == pytest.approx((5 - 2) / 3.5)
    assert summarize_latency([[1.0, 2.0]]).spread == 0


def test_no_value_is_said() -> None:
    with pytest.raises(ValueError, match="no value"):
        percentile([], 50)
