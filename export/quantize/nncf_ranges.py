"""NNCF's terms for the calibrators of `edgefg.export.quantize.calibrators`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from edgefg.export.quantize.calibrators import BINS, Histogram, choose_range
from edgefg.settings.quantization import Calibrator


@contextlib.contextmanager
def range_parameters(calibrator: Calibrator) -> Iterator[Any]:
    """Yield what `nncf.AdvancedQuantizationParameters` takes for the ranges of activations; valid inside only.

    * ``minmax``: the least and greatest of all images. The mean over the images, as in NNCF's own presets, kept 67 % of
      the classes where the extremes kept 92 %.
    * the others: NNCF's histogram of all images with our choice, which NNCF cannot be told by a parameter. Its own, for
      the squared error, goes by quantiles and never looks at the whole range: of a million values it drops a single
      outlier where the least error keeps half of its reach.

    What a depthwise convolution reads has a range for each channel in OpenVINO. NNCF has histograms of whole tensors
    alone, and takes the extremes of each channel there, whatever the calibrator.
    """
    from nncf.quantization import range_estimator as estimators

    known = estimators.RangeEstimatorParametersSet
    if calibrator == "minmax":
        yield known.MINMAX
    else:
        with _histograms_searched(calibrator):
            yield known.HISTOGRAM


@contextlib.contextmanager
def _histograms_searched(calibrator: Calibrator) -> Iterator[None]:
    """Put a calibrator behind NNCF's histograms, where its algorithm looks the class up."""
    from nncf.quantization.algorithms.min_max import algorithm

    usual: Any = algorithm.HistogramAggregator

    class Searched(usual):  # type: ignore[misc]
        """NNCF's histogram, in finer bins, of which the calibrator chooses the range."""

        def __init__(self, num_samples: int | None = None) -> None:
            super().__init__(bins=BINS, num_samples=num_samples)

        def _non_linear_param_search(self) -> tuple[float, float]:
            # The MIXED preset's activations are asymmetric.
            histogram = symmetric_histogram(self.histogram.data, self.min_val, self.max_val)
            return choose_range(calibrator, histogram, symmetric=False)

    algorithm.HistogramAggregator = Searched
    try:
        yield
    finally:
        algorithm.HistogramAggregator = usual


def symmetric_histogram(counts: Any, low: float, high: float) -> Histogram:
    """Return counts in bins of equal width between two values as a histogram around zero.

    Counts may be fractions, which NNCF makes where it widens its bins. Their sums from the least bin on are rounded, so
    that neither the total nor a percentile is lost.
    """
    edges = np.linspace(low, high, len(counts) + 1)
    reach = max(-low, high, float(np.finfo(np.float32).tiny))
    centres = (edges[1:] + edges[:-1]) / 2
    sums = np.cumsum(np.histogram(centres, BINS, (-reach, reach), weights=counts)[0])
    return Histogram(np.diff(np.rint(sums).astype(np.int64), prepend=0), reach, low, high)
