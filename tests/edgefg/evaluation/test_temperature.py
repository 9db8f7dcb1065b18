"""Temperature scaling: finds what was hidden, never makes likelihoods worse, stays sane where little can be told."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgefg.evaluation.temperature import HIGHEST, LOWEST, fit_temperature, scale_temperature
from edgefg.metrics import expected_calibration_error, negative_log_likelihood, softmax

Logits = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


def calibrated(images: int, classes: int = 10, seed: int = 0) -> tuple[Logits, Labels]:
    """Draw logits, and each label from their own softmax: at a temperature of 1 they are calibrated."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(scale=2.5, size=(images, classes)).astype(np.float32)
    # The label is the argmax of logits plus Gumbel noise: a draw from their softmax.
    labels = (logits + generator.gumbel(size=logits.shape)).argmax(axis=1)
    return logits, labels


@pytest.mark.parametrize("hidden", [0.3, 0.8, 1.7, 4.0])
def test_a_hidden_temperature_is_found(hidden: float) -> None:
    logits, labels = calibrated(4000)
    scaled = logits * np.float32(hidden)
    assert fit_temperature(scaled, labels) == pytest.approx(hidden, rel=0.06)
    temperature, report = scale_temperature(scaled, labels, "val of x")
    assert temperature == fit_temperature(scaled, labels)
    assert report.ece_after < report.ece_before / 2
    assert report.nll_after < report.nll_before
    assert (report.data, report.images, report.parts, report.unchanged) == ("val of x", 4000, 5, "")


def test_it_is_the_least_likelihood_of_a_fine_grid() -> None:
    logits, labels = calibrated(500, seed=3)
    found = fit_temperature(2 * logits, labels)
    grid = np.exp(np.linspace(np.log(LOWEST), np.log(HIGHEST), 4001))
    best = min(grid, key=lambda t: negative_log_likelihood(2 * logits, labels, t))
    assert found == pytest.approx(best, rel=2e-3)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 120), st.integers(2, 8), st.sampled_from([0.01, 0.5, 3.0, 60.0]), st.integers(0, 10**6))
def test_it_never_makes_the_likelihood_worse(images: int, classes: int, scale: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    logits = generator.normal(scale=scale, size=(images, classes)).astype(np.float32)
    labels = generator.integers(0, classes, images)
    temperature = fit_temperature(logits, labels)
    assert LOWEST <= temperature <= HIGHEST
    assert negative_log_likelihood(logits, labels, temperature) <= negative_log_likelihood(logits, labels)
    kept, report = scale_temperature(logits, labels, "x")
    assert report.nll_after <= report.nll_before
    assert (kept == 1) == bool(report.unchanged) == (report.parts == 0)
    if kept == 1:
        assert (report.ece_after, report.nll_after) == (report.ece_before, report.nll_before)
        assert report.nll_before == pytest.approx(negative_log_likelihood(logits, labels))
        assert report.ece_before == pytest.approx(expected_calibration_error(softmax(logits), labels))


def test_all_wrong_tells_no_temperature() -> None:
    logits, labels = np.tile(np.array([[4, 0, 1]], np.float32), (300, 1)), np.full(300, 1)
    assert fit_temperature(logits, labels) == 1
    temperature, report = scale_temperature(logits, labels, "x")
    assert temperature == 1
    assert report.unchanged == "all 300 images are wrong"
    assert report.ece_after == report.ece_before


@pytest.mark.parametrize("images", [30, 60, 600])
def test_all_right_makes_hesitant_answers_as_sure_as_their_number_allows(images: int) -> None:
    logits = np.tile(np.array([[1, 0, 0, 0]], np.float32), (images, 1))
    labels = np.zeros(images, np.int64)
    temperature, report = scale_temperature(logits, labels, "x")
    assert temperature == fit_temperature(logits, labels) < 1
    assert softmax(logits, temperature)[0, 0] == pytest.approx((images + 1) / (images + 2), abs=1e-4)
    assert report.ece_after < report.ece_before
    assert report.unchanged == ""


def test_all_right_and_sure_stays_so() -> None:
    logits = np.tile(np.array([[40, 0, 1]], np.float32), (300, 1))
    temperature, report = scale_temperature(logits, np.zeros(300, np.int64), "x")
    assert (temperature, report.ece_after) == (1, report.ece_before)


def test_one_error_among_sure_answers_stays_within_the_bounds() -> None:
    logits = np.tile(np.array([[0.02, 0]], np.float32), (300, 1))
    labels = np.zeros(300, np.int64)
    labels[7] = 1
    assert fit_temperature(logits, labels) == pytest.approx(LOWEST, rel=1e-3)
    assert fit_temperature(-1000 * logits, labels) == pytest.approx(HIGHEST, rel=1e-3)


def test_few_images_leave_it_at_one() -> None:
    logits, labels = calibrated(19)
    temperature, report = scale_temperature(logits * np.float32(4), labels, "x")
    assert (temperature, report.unchanged) == (1, "19 images are too few; at least 20 are needed, better hundreds")
    logits, labels = calibrated(20)
    assert scale_temperature(logits * np.float32(4), labels, "x")[0] > 1


def test_what_helps_no_unseen_image_is_not_taken() -> None:
    logits, labels = calibrated(40, seed=1)
    temperature, report = scale_temperature(logits, labels, "x")
    assert fit_temperature(logits, labels) != 1, "the images themselves would like another one"
    assert temperature == 1
    assert report.unchanged.startswith("the fitted one does not improve unseen images")


def test_the_figures_after_are_of_unseen_images() -> None:
    """With as few images as here, scaling by their own best temperature would look better than it is."""
    logits, labels = calibrated(60, seed=5)
    temperature, report = scale_temperature(logits * np.float32(3), labels, "x")
    assert temperature > 1
    assert negative_log_likelihood(logits * np.float32(3), labels, temperature) < report.nll_after


def test_the_same_images_give_the_same_answer() -> None:
    logits, labels = calibrated(100, seed=2)
    first, second = (scale_temperature(logits * np.float32(2), labels, "x") for _ in range(2))
    assert first == second


@pytest.mark.parametrize("call", [fit_temperature, lambda x, y: scale_temperature(x, y, "x")])
def test_nothing_to_fit_on_is_said(call: Any) -> None:
    with pytest.raises(ValueError, match="no image to score"):
        call(np.empty((0, 3), np.float32), np.empty(0, np.int64))
    with pytest.raises(ValueError, match="2 and 1 images"):
        call(np.zeros((2, 3), np.float32), np.zeros(1, np.int64))
