"""Calibrators: the ranges that activations are quantised to, from calibration images.

Four calibrators, to be compared by measurement:

* ``minmax``: the extremes over all images;
* ``percentile``: the 0.001th and the 99.999th percentile of all values of all images together. On each side, one value
  in 100,000 (rounded down) is clipped; the range always contains zero. With fewer than 100,000 values it is ``minmax``.
  On a symmetric grid, the end farther from zero sets the scale;
* ``mse``: the clipping range of the least mean squared quantisation error, over 121 shares of each extreme on the grid
  that is used, int8 symmetric or uint8 asymmetric (Banner et al. 2019, "Post training 4-bit quantization of
  convolutional networks for rapid-deployment", section 3, searched in a histogram);
* ``entropy``: the clipping range of the least Kullback–Leibler divergence (Migacz 2017, "8-bit Inference with
  TensorRT"). It treats rare values as outliers, and has cost EfficientNet-Lite0 44 points on ImageNet elsewhere. Use it
  for comparisons only.

All but ``minmax`` are chosen here, from histograms over all images. ONNX Runtime has no ``mse``, an ``entropy`` that
takes three minutes for a small network, and percentiles that count both sides as one on a symmetric grid. Its
histograms grow with the activations and hold all activations of the images of a call; these have a fixed size and see
one batch at a time.

The calibrators serve the targets that read ONNX. OpenVINO's models are quantised by NNCF, whose own estimators bear the
same names and differ in details, see `edgefg.export.targets.openvino`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edgefg.export.onnx.fp16 import BatchReader
from edgefg.export.onnx.rules import INPUT
from edgefg.preprocess import UInt8Array
from edgefg.progress import track
from edgefg.quiet import quiet
from edgefg.settings.quantization import Calibrator

# Bins over both signs: sixteen for each of uint8's levels where all activations are positive.
BINS = 8192
# The percentile clips one of this many values on each side.
_ONE_IN = 100_000
# Migacz's numbers. Every eighth bin is tried as an end.
_ENTROPY_BINS = 2048
_ENTROPY_LEVELS = 128
_ENTROPY_STEP = 8
_LEAST_COUNT = 1e-4
# Shares of an extreme that clipping may leave. Below a sixteenth, a level is hardly wider than a bin.
_SHARES = np.arange(128, 7, -1) / 128
_ROUNDS = 4


class Histogram(NamedTuple):
    """Distribution of a tensor's values."""

    counts: npt.NDArray[np.int64]
    """``int64 [bins]``, an even number of bins of equal width."""
    reach: float
    """The bins span −reach to reach. Greater than zero."""
    low: float
    """Least value."""
    high: float
    """Greatest value."""

    @property
    def edges(self) -> npt.NDArray[np.float32]:
        """Limits of the bins, ``float32 [bins + 1]``."""
        return np.linspace(-self.reach, self.reach, len(self.counts) + 1, dtype=np.float32)


def calibrate(
    source: Path, data: Sequence[UInt8Array], calibrator: Calibrator, op_types: Sequence[str], *, symmetric: bool
) -> Any:
    """Return the ranges of the tensors that some operators read and write, as ONNX Runtime's `TensorsData`.

    Args:
        source: FP32 ONNX of ``uint8 [batch, height, width, 3]``.
        data: batches of calibration images.
        calibrator: see the module.
        op_types: the types of these operators.
        symmetric: whether the grid is int8 around zero. Else it is uint8 with a zero point.
    """
    from onnxruntime.quantization import CalibrationMethod, create_calibrator
    from onnxruntime.quantization.calibrate import TensorData, TensorsData

    with tempfile.TemporaryDirectory(prefix="edgefg-") as folder, quiet():
        graph = str(Path(folder) / "augmented.onnx")
        tool = create_calibrator(source, op_types, graph, CalibrationMethod.MinMax)
        tool.collect_data(BatchReader(track(data, "calibrating")))
        ranges = tool.compute_data()
    if calibrator == "minmax":
        return ranges
    limits = {name: (found.lowest.item(), found.highest.item()) for name, found in ranges.items()}
    chosen = {}
    for name, histogram in histograms(source, data, limits, op_types).items():
        low, high = choose_range(calibrator, histogram, symmetric=symmetric)
        chosen[name] = TensorData(lowest=np.float32(low), highest=np.float32(high))
    return TensorsData(CalibrationMethod.MinMax, chosen)


def histograms(
    source: Path, data: Sequence[UInt8Array], limits: dict[str, tuple[float, float]], op_types: Sequence[str]
) -> dict[str, Histogram]:
    """Count the values of tensors whose extremes are known, batch by batch, in `BINS` bins each.

    Args:
        source: FP32 ONNX of ``uint8 [batch, height, width, 3]``.
        data: batches of calibration images.
        limits: least and greatest value of each tensor over these images.
        op_types: the types of the operators that read or write these tensors.
    """
    from onnxruntime.quantization import CalibrationMethod, create_calibrator

    reach = {name: max(-low, high, float(np.finfo(np.float32).tiny)) for name, (low, high) in limits.items()}
    counts = {name: np.zeros(BINS, np.int64) for name in limits}
    with tempfile.TemporaryDirectory(prefix="edgefg-") as folder, quiet():
        # Only the calibrator's graph is used, whose activations are outputs.
        graph = str(Path(folder) / "augmented.onnx")
        session = create_calibrator(source, op_types, graph, CalibrationMethod.Percentile).infer_session
        for batch in track(data, "collecting histograms"):
            for name, values in zip(counts, session.run(list(counts), {INPUT: batch}), strict=True):
                counts[name] += np.histogram(values, BINS, (-reach[name], reach[name]))[0]
    return {name: Histogram(counts[name], reach[name], *limits[name]) for name in limits}


def choose_range(calibrator: Calibrator, histogram: Histogram, *, symmetric: bool) -> tuple[float, float]:
    """Return a calibrator's range for a tensor.

    Args:
        calibrator: all but ``minmax``, which needs no histogram.
        histogram: the tensor's values.
        symmetric: whether the grid is int8 around zero. Else it is uint8 with a zero point.
    """
    if calibrator == "mse":
        return mse_range(histogram, symmetric=symmetric)
    return {"percentile": percentile_range, "entropy": entropy_range}[calibrator](histogram)


def percentile_range(histogram: Histogram) -> tuple[float, float]:
    """Return the 0.001th and the 99.999th percentile.

    They are rounded outwards to the edges of their bins, but not beyond the extremes. Zero is inside: the range
    of a ReLU begins there.
    """
    clipped = int(histogram.counts.sum()) // _ONE_IN
    first, last = (int(np.argmax(np.cumsum(counts) > clipped)) for counts in (histogram.counts, histogram.counts[::-1]))
    low, high = float(histogram.edges[first]), float(histogram.edges[::-1][last])
    return min(max(low, histogram.low), 0.0), max(min(high, histogram.high), 0.0)


def mse_range(histogram: Histogram, *, symmetric: bool) -> tuple[float, float]:
    """Return the range whose grid quantises a tensor with the least mean squared error, clipping included.

    The two ends are searched in turn, over shares of their extremes, until neither moves.

    Args:
        histogram: the tensor's values.
        symmetric: whether the grid is int8 around zero. Else it is uint8 with a zero point.
    """
    edges = histogram.edges.astype(np.float64)
    present = histogram.counts > 0
    values, counts = ((edges[1:] + edges[:-1]) / 2)[present], histogram.counts[present]
    if symmetric:
        ends = histogram.reach * _SHARES
        best = ends[np.argmin([_squared_error(values, counts, -end, end, symmetric=True) for end in ends])]
        return -float(best), float(best)
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    lows, highs = np.unique(low * _SHARES), np.unique(high * _SHARES)[::-1]
    for _ in range(_ROUNDS):
        before = (low, high)
        high = float(highs[np.argmin([_squared_error(values, counts, low, end, symmetric=False) for end in highs])])
        low = float(lows[np.argmin([_squared_error(values, counts, end, high, symmetric=False) for end in lows])])
        if (low, high) == before:
            break
    return low, high


def _squared_error(
    values: npt.NDArray[np.float64], counts: npt.NDArray[np.int64], low: float, high: float, *, symmetric: bool
) -> float:
    """Return the summed squared error of values that are quantised on ONNX Runtime's grid of a range."""
    from onnx import TensorProto
    from onnxruntime.quantization.quant_utils import compute_scale_zp, get_qmin_qmax_for_qType

    least, greatest = get_qmin_qmax_for_qType(TensorProto.INT8 if symmetric else TensorProto.UINT8, symmetric=symmetric)
    zero, scale = (
        float(number) for number in compute_scale_zp(np.float64(low), np.float64(high), least, greatest, symmetric)
    )
    quantised = np.clip(np.rint(values / scale) + zero, float(least), float(greatest))
    return float((counts * ((quantised - zero) * scale - values) ** 2).sum())


def entropy_range(histogram: Histogram) -> tuple[float, float]:
    """Return the range, symmetric as far as the extremes reach, of the least Kullback–Leibler divergence.

    Migacz's search compares the distribution of magnitudes, clipped, with the outliers in its last bin, with the same
    distribution in 128 levels. The zeros of a ReLU count no more than their neighbours, as in NVIDIA's
    pytorch-quantization: every grid holds them exactly, and their spike would pull the range towards zero. With the
    spike EfficientNet-Lite0 kept the class of 1 % of 300 grocery photographs, without it of 97 %.
    """
    half = len(histogram.counts) // 2
    magnitudes = histogram.counts[half:] + histogram.counts[half - 1 :: -1]
    counts = magnitudes.reshape(_ENTROPY_BINS, -1).sum(1)
    counts[0] = counts[1]
    if not counts.any():  # zeros, or almost only zeros
        return histogram.low, histogram.high
    ends = np.arange(_ENTROPY_LEVELS, _ENTROPY_BINS + 1, _ENTROPY_STEP)
    best = ends[np.argmin([_divergence(counts, int(end)) for end in ends])]
    limit = histogram.reach * float(best) / _ENTROPY_BINS
    return max(histogram.low, -limit), min(histogram.high, limit)


def _divergence(counts: npt.NDArray[np.int64], end: int) -> float:
    """Return the divergence of the first ``end`` bins, the others clipped, from the same bins in levels."""
    expected = counts[:end].astype(np.float64)
    present = expected > 0
    starts = np.arange(_ENTROPY_LEVELS) * end // _ENTROPY_LEVELS
    # A level's counts are spread over those of its bins that hold any.
    shares = np.add.reduceat(expected, starts) / np.maximum(np.add.reduceat(present.astype(np.int64), starts), 1)
    found = np.where(present, np.repeat(shares, np.diff(starts, append=end)), 0.0)
    expected[-1] += counts[end:].sum()
    filled = expected > 0
    # The last bin may hold only clipped values, which no level represents.
    p, q = expected[filled], np.maximum(found[filled], _LEAST_COUNT)
    return float((p / p.sum() * np.log((p / p.sum()) / (q / q.sum()))).sum())
