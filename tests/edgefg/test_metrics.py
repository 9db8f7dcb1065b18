"""edgefg.metrics against torchmetrics, against values by hand, and at its edges."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgefg import metrics
from edgefg.metrics import softmax

Case = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Logits without ties and labels that often leave classes out."""
    images, classes = draw(st.integers(1, 40)), draw(st.integers(2, 9))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = generator.normal(scale=draw(st.sampled_from([0.1, 2.0, 30.0])), size=(images, classes))
    used = draw(st.lists(st.integers(0, classes - 1), min_size=1, max_size=classes, unique=True))
    return logits.astype(np.float32), generator.choice(np.array(used), size=images)


@given(cases())
@settings(deadline=None, max_examples=60)
def test_equals_torchmetrics(case: Case) -> None:
    import torch
    import torchmetrics.functional.classification as tm

    logits, labels = case
    classes = logits.shape[1]
    x, y = torch.from_numpy(logits), torch.from_numpy(labels)
    probabilities = torch.from_numpy(softmax(logits))
    scores = metrics.score(logits, labels, classes)

    def same(mine: float, theirs: object, tolerance: float = 1e-6) -> None:
        assert mine == pytest.approx(float(theirs), abs=tolerance)  # type: ignore[arg-type]

    same(scores.top1, tm.multiclass_accuracy(x, y, classes, average="micro"))
    same(scores.top5, tm.multiclass_accuracy(x, y, classes, average="micro", top_k=min(5, classes)))
    same(scores.macro_f1, tm.multiclass_f1_score(x, y, classes, average="macro"))
    same(scores.ece, tm.multiclass_calibration_error(probabilities, y, classes, n_bins=15, norm="l1"), 1e-5)
    same(scores.nll, torch.nn.functional.cross_entropy(x.double(), y))
    recall = tm.multiclass_recall(x, y, classes, average=None).numpy()[np.unique(labels)]
    same(scores.balanced, recall.mean())
    expected = tm.multiclass_confusion_matrix(x, y, classes).numpy()
    assert np.array_equal(metrics.confusion_matrix(logits.argmax(axis=1), labels, classes), expected)


@given(cases(), st.integers(1, 12))
@settings(deadline=None)
def test_top_k_is_what_sorting_gives(case: Case, k: int) -> None:
    logits, labels = case
    logits = logits.round(1)  # with ties
    best = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    assert metrics.top_k_accuracy(logits, labels, k) == pytest.approx(
        (best == labels[:, np.newaxis]).any(axis=1).mean()
    )


@given(cases(), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_the_order_of_the_images_does_not_matter(case: Case, seed: int) -> None:
    logits, labels = case
    logits = logits.round(1)
    order = np.random.default_rng(seed).permutation(len(labels))
    first, second = (
        metrics.score(x, y, logits.shape[1]) for x, y in ((logits, labels), (logits[order], labels[order]))
    )
    assert [getattr(first, name) for name in first.__struct_fields__] == pytest.approx(
        [getattr(second, name) for name in second.__struct_fields__], abs=1e-6
    )


def test_a_class_with_no_image() -> None:
    predicted, labels = np.array([0, 0, 1, 3]), np.array([0, 1, 1, 1])
    recall = metrics.per_class_recall(predicted, labels, 5)
    assert recall[:2].tolist() == [1.0, 1 / 3]
    assert np.isnan(recall[2:]).all()
    # Class 3 was only predicted: it does not enter the mean recall, but it counts as 0 in the mean F1.
    assert metrics.balanced_accuracy(predicted, labels, 5) == pytest.approx((1 + 1 / 3) / 2)
    assert metrics.macro_f1(predicted, labels, 5) == pytest.approx((2 / 3 + 2 / 4 + 0) / 3)


def test_confusion_matrix_has_labels_in_rows() -> None:
    counts = metrics.confusion_matrix(np.array([1, 1, 0]), np.array([0, 0, 0]), 2)
    assert counts.tolist() == [[1, 2], [0, 0]]
    assert counts.dtype == np.int64


def test_calibration_error_by_hand() -> None:
    # Two images of confidence 0.8, one right: gap 0.3. One of confidence 1, right: gap 0.
    probabilities = np.array([[0.8, 0.2], [0.8, 0.2], [0.0, 1.0]], np.float32)
    found = metrics.expected_calibration_error(probabilities, np.array([0, 1, 1]))
    assert found == pytest.approx(2 / 3 * 0.3, abs=1e-6)


def test_calibration_bins_by_hand() -> None:
    confidence = np.array([0.05, 0.4, 0.49, 1.0, 0.5])
    found = metrics.calibration_bins(confidence, np.array([False, True, False, True, True]), bins=2)
    assert found.images.tolist() == [3, 1, 1]
    assert found.confidence.tolist() == pytest.approx([0.94 / 3, 0.5, 1.0])
    assert found.accuracy.tolist() == pytest.approx([1 / 3, 1.0, 1.0])
    assert np.isnan(metrics.calibration_bins(confidence[:1], np.array([True]), bins=2).accuracy[1:]).all()


def test_a_temperature_moves_calibration_but_not_accuracy() -> None:
    generator = np.random.default_rng(1)
    labels = generator.integers(0, 4, 400)
    logits = (4 * np.eye(4)[labels] + generator.normal(scale=4, size=(400, 4))).astype(np.float32)
    cold, warm = metrics.score(logits, labels, 4, temperature=0.2), metrics.score(logits, labels, 4, temperature=4.0)
    assert cold.top1 == warm.top1
    assert warm.nll < cold.nll
    assert warm.ece < cold.ece


def test_risk_coverage_by_hand() -> None:
    confidence, correct = np.array([0.9, 0.5, 0.7, 0.8]), np.array([True, False, False, True])
    coverage, risk = metrics.risk_coverage(confidence, correct)
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert risk.tolist() == pytest.approx([0, 0, 1 / 3, 1 / 2])
    assert metrics.aurc(confidence, correct) == pytest.approx((0 + 0 + 1 / 3 + 1 / 2) / 4)
    assert metrics.coverage_at_risk(confidence, correct, 0.0) == 0.5
    assert metrics.coverage_at_risk(confidence, correct, 0.4) == 0.75


def test_no_threshold_splits_equal_confidences() -> None:
    confidence, correct = np.full(4, 0.5), np.array([True, True, True, False])
    coverage, risk = metrics.risk_coverage(confidence, correct)
    assert (coverage.tolist(), risk.tolist()) == ([1.0], [0.25])
    assert metrics.aurc(confidence, correct) == 0.25
    assert metrics.coverage_at_risk(confidence, correct, 0.2) == 0.0


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    # Newcombe 1998, table I, method 3 (Wilson).
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_of_the_literature(correct: int, total: int, low: float, high: float) -> None:
    assert metrics.wilson_interval(correct, total) == pytest.approx((low, high), abs=5e-5)
    mirrored = metrics.wilson_interval(total - correct, total)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999))
def test_wilson_interval_holds_the_share(counts: tuple[int, int], level: float) -> None:
    low, high = metrics.wilson_interval(*counts, level=level)
    assert 0 <= low <= counts[0] / counts[1] <= high <= 1
    assert low < high


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 5))
def test_mcnemar_is_the_two_sided_binomial_test(only_a: int, only_b: int, both: int) -> None:
    a = np.array([True] * only_a + [False] * only_b + [True] * both + [False])
    b = np.array([False] * only_a + [True] * only_b + [True] * both + [False])
    n = only_a + only_b
    tail = sum(Fraction(math.comb(n, i), 2**n) for i in range(min(only_a, only_b) + 1))
    assert metrics.mcnemar_p(a, b) == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-12)
    assert metrics.mcnemar_p(a, b) == metrics.mcnemar_p(b, a)


def test_mcnemar_of_many_images_does_not_overflow() -> None:
    a = np.arange(6000) < 3200
    assert 0 < metrics.mcnemar_p(a, ~a) < 1e-6


_NONE = np.array([], np.int64)
_NO_LOGITS = np.zeros((0, 3), np.float32)


@pytest.mark.parametrize(
    "call",
    [
        lambda: metrics.score(_NO_LOGITS, _NONE, 3),
        lambda: metrics.top_k_accuracy(_NO_LOGITS, _NONE),
        lambda: metrics.confusion_matrix(_NONE, _NONE, 3),
        lambda: metrics.balanced_accuracy(_NONE, _NONE, 3),
        lambda: metrics.macro_f1(_NONE, _NONE, 3),
        lambda: metrics.expected_calibration_error(_NO_LOGITS, _NONE),
        lambda: metrics.negative_log_likelihood(_NO_LOGITS, _NONE),
        lambda: metrics.aurc(_NONE.astype(float), _NONE.astype(bool)),
        lambda: metrics.mcnemar_p(_NONE.astype(bool), _NONE.astype(bool)),
    ],
)
def test_nothing_to_measure_is_said(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="no image to score"):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.score(np.zeros((2, 3), np.float32), np.array([0, 3]), 3), "from 0 to 3; expected 0 to 2"),
        (lambda: metrics.score(np.zeros((2, 3), np.float32), np.array([0, -1]), 3), "from -1 to 0"),
        (lambda: metrics.score(np.zeros((2, 3), np.float32), np.array([0]), 3), "2 and 1 images"),
        (lambda: metrics.score(np.zeros((2, 3), np.float32), np.array([0, 1]), 4), r"\[2, 3\]; expected \[N, 4\]"),
        (lambda: metrics.score(np.full((2, 3), np.nan, np.float32), np.array([0, 1]), 3), "2 of 2 .*not finite"),
        (lambda: metrics.score(np.zeros((1, 3), np.float32), np.array([0]), 3, temperature=0.0), "temperature is 0"),
        (lambda: metrics.negative_log_likelihood(np.zeros((1, 3)), np.array([-1])), "from -1 to -1"),
        (lambda: metrics.negative_log_likelihood(np.zeros((1, 3)), np.array([0]), -1.0), "temperature is -1"),
        (lambda: metrics.top_k_accuracy(np.zeros((1, 3)), np.array([0]), k=0), "k is 0"),
        (lambda: metrics.top_k_accuracy(np.zeros(3), np.array([0])), r"shape \[3\]"),
        (lambda: metrics.confusion_matrix(np.array([4]), np.array([0]), 3), "expected 0 to 2"),
        (lambda: metrics.expected_calibration_error(np.ones((1, 2)) / 2, np.array([0]), bins=0), "bins is 0"),
        (lambda: metrics.risk_coverage(np.array([np.nan]), np.array([True])), "NaN"),
        (lambda: metrics.coverage_at_risk(np.array([0.5]), np.array([True]), 1.5), "risk is 1.5"),
        (lambda: metrics.wilson_interval(0, 0), "0 of 0"),
        (lambda: metrics.wilson_interval(3, 2), "3 of 2"),
        (lambda: metrics.wilson_interval(1, 2, level=1.0), "level is 1.0"),
        (lambda: metrics.mcnemar_p(np.array([True]), np.array([True, False])), "1 and 2 images"),
    ],
)
def test_what_does_not_fit_is_said(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
