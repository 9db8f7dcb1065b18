"""edgefg.evaluation.views against torchmetrics and scikit-learn, against values by hand, and at its edges."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgefg.evaluation import views as views

Kinds = tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]


@st.composite
def two_kinds(draw: st.DrawFn) -> Kinds:
    """Scores, often tied, of positive and negative images."""
    images = draw(st.integers(2, 60))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    positive = generator.random(images) < 0.4
    positive[:2] = True, False
    scores = generator.normal(loc=positive.astype(float), size=images)
    return scores.round(draw(st.sampled_from([0, 1, 8]))), positive


@given(two_kinds(), st.sampled_from([0.0, 0.01, 0.05, 0.3, 1.0]))
@settings(deadline=None, max_examples=80)
def test_roc_equals_scikit_learn(kinds: Kinds, rate: float) -> None:
    from sklearn.metrics import roc_auc_score, roc_curve

    scores, positive = kinds
    assert views.roc_auc(scores, positive) == pytest.approx(roc_auc_score(positive, scores))
    false, true, thresholds = roc_curve(positive, scores, drop_intermediate=False)
    best = true[false <= rate + 1e-12].max()
    found = views.recall_at_false_positives(scores, positive, rate)
    assert found.recall == pytest.approx(best)
    assert (scores[~positive] >= found.threshold).mean() <= rate + 1e-12
    assert (scores[positive] >= found.threshold).mean() == pytest.approx(best)
    assert math.isinf(found.threshold) == (thresholds[false <= rate + 1e-12].min() == math.inf)


def test_the_rate_is_in_whole_images() -> None:
    # One of twenty negatives is 5 %, and so it is for 1 - 0.95, which is a little more in floating point, and for
    # 0.05·20, which could be a little less.
    scores = np.concatenate([np.arange(20.0), [18.5, 30.0]])
    positive = np.arange(22) >= 20
    for rate in (0.05, 1 - 0.95):
        found = views.recall_at_false_positives(scores, positive, rate)
        assert (found.threshold, found.found, found.positives) == (18.5, 2, 2)
    assert views.recall_at_false_positives(scores, positive, 0.049).found == 1


def test_nothing_is_found_where_a_negative_is_highest() -> None:
    found = views.recall_at_false_positives(np.array([0.2, 0.9]), np.array([True, False]), 0.0)
    assert (found.threshold, found.recall) == (math.inf, 0.0)


def test_class_table_by_hand() -> None:
    # Class 0: two of three found, and one of class 1 called so. Class 2: never there, never said. Class 3: only said.
    table = views.class_table(np.array([0, 0, 3, 0, 1]), np.array([0, 0, 0, 1, 1]), 4)
    assert table.images.tolist() == [3, 2, 0, 0]
    assert table.recall[:2].tolist() == pytest.approx([2 / 3, 1 / 2])
    assert table.precision[[0, 1, 3]].tolist() == pytest.approx([2 / 3, 1, 0])
    assert table.f1[[0, 1, 3]].tolist() == pytest.approx([2 / 3, 2 / 3, 0])
    assert np.isnan([*table.recall[2:], table.precision[2], table.f1[2]]).all()


def test_confusions_are_directed_and_sorted() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2, 2])
    predicted = np.array([1, 1, 0, 0, 1, 1, 0])
    assert views.confusions(predicted, labels, 3) == ((0, 1, 2), (1, 0, 1), (2, 0, 1), (2, 1, 1))
    assert views.confusions(labels, labels, 3) == ()


def test_a_group_wins_by_its_sum() -> None:
    # No class of "small" is the most probable one, together they are.
    probabilities = np.array([[0.4, 0.3, 0.3], [0.8, 0.1, 0.1]], np.float32)
    predicted, of_class = views.group_predictions(probabilities, ("big", "small", "small"))
    assert of_class.tolist() == [0, 1, 1]
    assert predicted.tolist() == [1, 0]


def test_unknown_rejection_by_hand() -> None:
    known = np.arange(1, 21) / 20  # 0.05, 0.10, … 1: 95 % of them reach 0.10
    found = views.reject_unknown(known, np.array([0.05, 0.0999, 0.1, 0.7]))
    assert (found.threshold, found.kept, found.rejected, found.unknown) == (0.1, 0.95, 2, 4)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=50), st.floats(0.01, 1))
def test_the_threshold_keeps_what_was_asked_and_is_the_greatest_that_does(known: list[float], keep: float) -> None:
    values = np.array(known)
    found = views.reject_unknown(values, np.array([0.5]), keep)
    assert found.kept >= keep - 1e-9
    assert (values > found.threshold).mean() < keep
    assert found.rejected == (found.threshold > 0.5)


_ONE = np.array([0.5])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: views.roc_auc(_ONE, np.array([True])), "1 of 1 images are positive"),
        (lambda: views.roc_auc(np.array([0.5, np.nan]), np.array([True, False])), "NaN"),
        (lambda: views.roc_auc(_ONE, np.array([True, False])), "1 and 2 images"),
        (lambda: views.recall_at_false_positives(np.zeros(2), np.array([True, False]), 1.5), "rate is 1.5"),
        (lambda: views.reject_unknown(_ONE, np.zeros(0)), "1 known and 0 unknown"),
        (lambda: views.reject_unknown(_ONE, _ONE, 0.0), "share to keep is 0"),
        (lambda: views.group_predictions(np.zeros((1, 2)), ("a",)), r"\[1, 2\]; expected \[N, 1\]"),
    ],
)
def test_what_does_not_fit_is_said(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
