"""Calibrators against their formulas in NumPy, on data whose outliers are known."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgefg.export.quantize.calibrators import (
    BINS,
    Histogram,
    calibrate,
    entropy_range,
    mse_range,
    percentile_range,
)
from edgefg.export.targets import target_of
from edgefg.preprocess import UInt8Array
from edgefg.settings.quantization import Calibrator
from tests.export.quantizing import quantizer_of

Values = npt.NDArray[np.float64]
SHARES = np.arange(8, 129) / 128
GLARING = 100 * 90.0


def _histogram(values: Values) -> Histogram:
    reach = float(np.abs(values).max())
    counts = np.histogram(values, BINS, (-reach, reach))[0]
    return Histogram(counts, reach, float(values.min()), float(values.max()))


def _error(values: Values, low: float, high: float, *, symmetric: bool) -> float:
    """Mean squared error of int8 around zero, or of uint8 with a zero point, spelt out."""
    if symmetric:
        scale = max(-low, high) / 127
        quantised = np.clip(np.rint(values / scale), -127, 127) * scale
    else:
        scale = (max(high, 0) - min(low, 0)) / 255
        zero = np.rint(-min(low, 0) / scale)
        quantised = (np.clip(np.rint(values / scale) + zero, 0, 255) - zero) * scale
    return float(((quantised - values) ** 2).mean())


def _divergence(counts: Values, end: int, levels: int = 128) -> float:
    """Migacz's listing, slide 38: bins beyond the end clipped into its last one, against levels of equal width."""
    p = [float(count) for count in counts[:end]]
    q = [0.0] * end
    for level in range(levels):
        members = range(level * end // levels, (level + 1) * end // levels)
        filled = [i for i in members if p[i] > 0]
        for i in filled:
            q[i] = sum(p[j] for j in members) / len(filled)
    p[-1] += float(counts[end:].sum())
    pairs = [(a, max(b, 1e-4)) for a, b in zip(p, q, strict=True) if a > 0]
    whole_p, whole_q = sum(a for a, _ in pairs), sum(b for _, b in pairs)
    return sum(a / whole_p * np.log((a / whole_p) / (b / whole_q)) for a, b in pairs)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 99), st.sampled_from([0.0, 8.0, 60.0]), st.booleans())
def test_mse_takes_the_range_of_the_least_error(seed: int, outlier: float, symmetric: bool) -> None:
    values = np.append(np.random.default_rng(seed).normal(0, 1, 20_000), outlier)
    found = _error(values, *mse_range(_histogram(values), symmetric=symmetric), symmetric=symmetric)
    least, greatest = values.min(), values.max()
    if symmetric:
        reach = max(-least, greatest)
        best = min(_error(values, -share * reach, share * reach, symmetric=True) for share in SHARES)
    else:
        best = min(
            _error(values, low * least, high * greatest, symmetric=False) for low in SHARES[::6] for high in SHARES
        )
    assert found <= 1.03 * best


def test_mse_clips_an_outlier_where_that_pays_and_leaves_a_uniform_tensor_whole() -> None:
    """An outlier at M among n values, with steps of c / 127 and errors of a step² / 12, is best cut off at c =
    M / (1 + n / (12 · 127²)), where the derivative of n c² / (12 · 127²) + (M − c)² vanishes."""
    values = np.append(np.random.default_rng(0).normal(0, 1, 1_000_000), 60.0)
    assert mse_range(_histogram(values), symmetric=True)[1] == pytest.approx(60 / (1 + 1e6 / (12 * 127**2)), rel=0.05)
    low, high = mse_range(_histogram(values), symmetric=False)
    assert -6 < low < -2
    share = 1e6 / (12 * 255**2)
    assert high == pytest.approx((60 + share * low) / (1 + share), rel=0.15)
    even = np.linspace(0, 6, 10_000)
    assert mse_range(_histogram(even), symmetric=True) == (-6, 6)
    assert mse_range(_histogram(even), symmetric=False) == (0, 6)


def test_entropy_is_migaczs_search() -> None:
    values = np.concatenate([np.random.default_rng(0).laplace(0, 1, 20_000), np.zeros(20_000), [30.0]])
    histogram = _histogram(values)
    counts = np.histogram(np.abs(values), 2048, (0, histogram.reach))[0]
    counts[0] = counts[1]
    ends = np.arange(128, 2049, 8)
    best = ends[np.argmin([_divergence(counts, int(end)) for end in ends])]
    low, high = entropy_range(histogram)
    assert high == pytest.approx(histogram.reach * best / 2048)
    assert high < 15
    assert low == pytest.approx(max(values.min(), -high))
    assert entropy_range(_histogram(values[values != 0])) == (low, high), "zeros must not matter"


def test_percentile_clips_one_value_in_100_000_on_each_side() -> None:
    """Two of 200,000 values, and none of 99,999; a bin is 12 / 4096 wide."""
    rest = np.linspace(-1, 2, 200_000 - 7)
    low, high = percentile_range(_histogram(np.concatenate([[-8, -7, -6], rest, [9, 10, 11, 12]])))
    assert (low, high) == (pytest.approx(-6, abs=12 / 4096), pytest.approx(10, abs=12 / 4096))
    assert low <= -6
    assert high >= 10
    assert percentile_range(_histogram(np.concatenate([[-8], rest[: 99_999 - 2], [12]]))) == (-8, 12)


def test_percentile_keeps_zero_at_the_end_of_one_sided_tensors() -> None:
    relu = np.concatenate([np.zeros(150_000), np.linspace(0, 2, 49_999), [12]])
    for sign in (1, -1):
        zero, end = percentile_range(_histogram(sign * relu))[::sign]
        assert (zero, sign * end) == (0, pytest.approx(2, abs=12 / 4096))
    assert percentile_range(_histogram(np.linspace(5, 6, 1000))) == (0, 6)


def test_a_tensor_that_is_always_zero() -> None:
    histogram = Histogram(np.bincount([BINS // 2], minlength=BINS), float(np.finfo(np.float32).tiny), 0.0, 0.0)
    assert mse_range(histogram, symmetric=False) == (0, 0)
    assert percentile_range(histogram) == (0, 0)
    assert entropy_range(histogram) == (0, 0)
    assert np.isfinite(mse_range(histogram, symmetric=True)).all()


@pytest.fixture(scope="module")
def pixels() -> UInt8Array:
    """Six photographs of values up to 40, the first one dim, with one glaring pixel in the last."""
    inputs = np.random.default_rng(0).binomial(40, 0.3, (6, 224, 224, 3)).astype(np.uint8)
    inputs[0] //= 8
    inputs[-1, 0, 0, 0] = 100
    return inputs


def _data(pixels: UInt8Array) -> Values:
    """No grid of 256 levels fits these by chance."""
    return pixels * (pixels - 10.0)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A convolution whose input is `_data` of the pixels."""
    weights = numpy_helper.from_array(np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32), "w")
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["planes"], "transpose", perm=[0, 3, 1, 2]),
        helper.make_node("Sub", ["planes", "ten"], ["less"], "sub"),
        helper.make_node("Mul", ["planes", "less"], ["data"], "mul"),
        helper.make_node("Conv", ["data", "w"], ["features"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("ReduceMean", ["features", "axes"], ["logits"], "mean", keepdims=0),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, [1, 224, 224, 3])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 4])
    constants = [
        weights,
        numpy_helper.from_array(np.array([10], np.float32), "ten"),
        numpy_helper.from_array(np.array([2, 3]), "axes"),
    ]
    graph = helper.make_graph(nodes, "g", [images], [logits], constants)
    path = tmp_path_factory.mktemp("plain") / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("calibrator", get_args(Calibrator))
def test_calibrators_on_a_graph(plain: Path, pixels: UInt8Array, calibrator: Calibrator, symmetric: bool) -> None:
    data, values = [row[None] for row in pixels], _data(pixels)
    found = calibrate(plain, data, calibrator, ["Conv"], symmetric=symmetric)["data"]
    low, high = found.lowest.item(), found.highest.item()
    if calibrator == "minmax":
        assert (low, high) == (-25, GLARING)
    elif calibrator == "percentile":  # nine of 903,168 values lie beyond
        assert values[values < high].size > 0.9999 * values.size
        assert high < 0.1 * GLARING
    elif calibrator == "mse":
        best = min(_error(values, -25, GLARING * share, symmetric=symmetric) for share in SHARES)
        assert _error(values, low, high, symmetric=symmetric) <= 1.05 * best
        assert high < 0.9 * GLARING
    else:
        assert high < 0.1 * GLARING
        assert low == -25


def _openvino_range(plain: Path, pixels: UInt8Array, calibrator: Calibrator, folder: Path) -> tuple[float, float]:
    path = quantizer_of("openvino", plain, pixels, calibrator=calibrator).write(folder)
    found = target_of("openvino").activation_params(path)["data"]
    scale, zero = float(found.scale), int(found.zero)
    return -zero * scale, (255 - zero) * scale


def test_openvino_has_nncfs_own_estimators(plain: Path, pixels: UInt8Array, tmp_path: Path) -> None:
    assert _openvino_range(plain, pixels, "minmax", tmp_path) == (
        pytest.approx(-25, abs=GLARING / 255), pytest.approx(GLARING, rel=0.01)
    )  # fmt: skip
    by_image = np.quantile(_data(pixels).reshape(len(pixels), -1), [1e-4, 1 - 1e-4], axis=1)
    low, high = _openvino_range(plain, pixels, "percentile", tmp_path)
    assert high == pytest.approx(by_image[1].max(), rel=0.02)
    assert high < 0.1 * GLARING
    assert low == pytest.approx(by_image[0].min(), abs=high / 255)
    assert _openvino_range(plain, pixels, "mse", tmp_path)[1] < 0.9 * GLARING


def test_in_openvino_one_image_sets_the_percentile(plain: Path, pixels: UInt8Array, tmp_path: Path) -> None:
    """Of 150,528 values of an image 15 are clipped; 20 glare in one of them."""
    pixels = pixels.copy()
    pixels[-1, :4, :5, 0] = 100
    assert _openvino_range(plain, pixels, "percentile", tmp_path)[1] == pytest.approx(GLARING, rel=0.01)


@pytest.mark.parametrize("to", ["onnx", "tensorrt-onnx"])
def test_one_image_does_not_set_the_percentile(plain: Path, pixels: UInt8Array, to: str, tmp_path: Path) -> None:
    """Of 903,168 values nine are clipped on each side. Nine glare, all in the last image, of which a percentile of that
    image alone would clip one, and one of both sides together four."""
    pixels = pixels.copy()
    pixels[-1, :3, :3, 0] = 100
    path = quantizer_of(to, plain, pixels, calibrator="percentile").write(tmp_path)
    found = target_of(to).activation_params(path)["data"]
    low, high = np.sort(_data(pixels), axis=None)[[9, -10]]
    assert high < 0.1 * GLARING
    levels = (high, 127) if to == "tensorrt-onnx" else (high - low, 255)
    # Two bins, and what FP16 adds to a scale.
    assert float(found.scale) == pytest.approx(levels[0] / levels[1], abs=2 * GLARING / 4096 / levels[1], rel=1e-3)
    assert float(found.scale) >= 0.99 * levels[0] / levels[1]
