"""NNCF's terms for the calibrators of `edgefg.export.ranges`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from edgefg.export.ranges import BINS, Calibrator, Histogram, entropy_range, mse_range


@contextlib.contextmanager
def range_parameters(calibrator: Calibrator) -> Iterator[Any]:
    """Yield what `nncf.AdvancedQuantizationParameters` takes for the ranges of activations; valid inside only.

    * ``minmax``, ``percentile``: the least and greatest of all images. The mean over the images, as in NNCF's own
      presets, kept 67 % of the classes where the extremes kept 92 %.
    * ``mse``, ``entropy``: NNCF's histogram with our search, which NNCF cannot be told by a parameter. Its own, for the
      squared error, goes by quantiles and never looks at the whole range: of a million values it drops a single outlier
      where the least error keeps half of its reach.
    """
    from nncf.quantization import range_estimator as estimators

    known = estimators.RangeEstimatorParametersSet
    if calibrator == "minmax":
        yield known.MINMAX
    elif calibrator == "percentile":
        yield _percentile(estimators)
    else:
        with _histograms_searched(_mse_range if calibrator == "mse" else entropy_range):
            yield known.HISTOGRAM


def _mse_range(histogram: Histogram) -> tuple[float, float]:
    """Search for NNCF's MIXED preset, whose activations are asymmetric."""
    return mse_range(histogram, symmetric=False)


def _percentile(estimators: Any) -> Any:
    """Describe the least 0.001th and the greatest 99.999th percentile of all images."""
    quantile, order = estimators.StatisticsType.QUANTILE, estimators.AggregatorType
    low, high = (
        estimators.StatisticsCollectorParameters(
            statistics_type=quantile, aggregator_type=aggregator, quantile_outlier_prob=1e-5
        )
        for aggregator in (order.MIN, order.MAX)
    )
    return estimators.RangeEstimatorParameters(low, high)


@contextlib.contextmanager
def _histograms_searched(search: Callable[[Histogram], tuple[float, float]]) -> Iterator[None]:
    """Put another search behind NNCF's histograms, where its algorithm looks the class up."""
    from nncf.quantization.algorithms.min_max import algorithm

    usual: Any = algorithm.HistogramAggregator

    class Searched(usual):  # type: ignore[misc]
        """NNCF's histogram, in finer bins, of which the range is chosen by the given search."""

        def __init__(self, num_samples: int | None = None) -> None:
            super().__init__(bins=BINS, num_samples=num_samples)

        def _non_linear_param_search(self) -> tuple[float, float]:
            return search(symmetric_histogram(self.histogram.data, self.min_val, self.max_val))

    algorithm.HistogramAggregator = Searched
    try:
        yield
    finally:
        algorithm.HistogramAggregator = usual


def symmetric_histogram(counts: Any, low: float, high: float) -> Histogram:
    """Return counts in bins of equal width between two values as a histogram around zero."""
    edges = np.linspace(low, high, len(counts) + 1)
    reach = max(-low, high, float(np.finfo(np.float32).tiny))
    centres = (edges[1:] + edges[:-1]) / 2
    whole = np.rint(np.histogram(centres, BINS, (-reach, reach), weights=counts)[0]).astype(np.int64)
    return Histogram(whole, reach, low, high)
