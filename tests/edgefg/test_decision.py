"""Logits → Prediction, against values computed by hand or in float64."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgefg import EdgefgError
from edgefg.artifact.hashes import FileInfo
from edgefg.artifact.manifest import Manifest, OutputSpec, Provenance, RuntimeInfo
from edgefg.decision import ClassProbability, Prediction, Rollup, decide
from edgefg.errors import InferenceError
from edgefg.metrics import softmax
from edgefg.preprocess import InputSpec
from edgefg.taxonomy import TaxonomyLevel


def _manifest(
    labels: tuple[str, ...] = ("a", "b", "c", "d"),
    *,
    temperature: float = 1.0,
    threshold: float | None = None,
    taxonomy: tuple[TaxonomyLevel, ...] = (),
) -> Manifest:
    return Manifest(
        schema=1,
        model="m.null",
        labels=labels,
        input=InputSpec(height=4, width=4),
        output=OutputSpec(temperature=temperature, reject_threshold=threshold),
        precision="fp32",
        runtime=RuntimeInfo(name="null", version="1"),
        files=(FileInfo(name="m.null", size=0, sha256="0" * 64),),
        provenance=Provenance(edgefg="0", parent="0"),
        taxonomy=taxonomy,
    )


def _logits_of(*probabilities: float) -> np.ndarray:
    return np.log(np.array(probabilities, np.float32))


finite = st.floats(-1e4, 1e4, width=32)


@settings(deadline=None)
@given(st.lists(finite, min_size=1, max_size=50), st.floats(0.05, 50))
def test_softmax_is_the_formula(logits: list[float], temperature: float) -> None:
    found = softmax(np.array(logits, np.float32), temperature)
    scaled = np.array(logits, np.float64) / temperature
    exact = np.exp(scaled - scaled.max())
    exact /= exact.sum()
    # float32 keeps 24 bits of logit / temperature, which the exponential turns into a relative error.
    tolerance = 1e-5 + np.abs(scaled).max() * 2e-7
    np.testing.assert_allclose(found, exact, atol=tolerance)
    assert found.dtype == np.float32
    assert math.isclose(float(found.sum()), 1.0, abs_tol=1e-5)


def test_softmax_does_not_overflow_and_works_by_row() -> None:
    found = softmax(np.array([[3e38, -3e38, 0], [1, 1, 1]], np.float32))
    np.testing.assert_allclose(found, np.array([[1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]]), rtol=1e-6)


def test_best_class_with_its_probability() -> None:
    found = decide(_logits_of(0.2, 0.5, 0.1, 0.2), _manifest(), 3, (1.5, 2.5))
    assert (found.label, found.index) == ("b", 1)
    assert found.confidence == pytest.approx(0.5, abs=1e-6)
    assert [(c.label, c.index) for c in found.top_k] == [("b", 1), ("a", 0), ("d", 3)]
    assert [c.confidence for c in found.top_k] == pytest.approx([0.5, 0.2, 0.2], abs=1e-6)
    assert (found.rejected, found.rollup) == (False, None)
    assert (found.timings.preprocess, found.timings.infer) == (1.5, 2.5)
    assert found.timings.total == found.timings.preprocess + found.timings.infer + found.timings.decide
    np.testing.assert_array_equal(found.logits, _logits_of(0.2, 0.5, 0.1, 0.2))


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 0.8), (2.0, 2 / 3), (0.5, 16 / 17)])
def test_temperature(temperature: float, expected: float) -> None:
    # Odds of 4 to 1 become odds of 4^(1/T) to 1.
    found = decide(_logits_of(0.8, 0.2), _manifest(("a", "b"), temperature=temperature), 1)
    assert found.confidence == pytest.approx(expected, abs=1e-6)


def test_ties_go_to_the_lower_index() -> None:
    found = decide(np.zeros(4, np.float32), _manifest(), 4)
    assert [c.index for c in found.top_k] == [0, 1, 2, 3]
    assert found.index == 0


def test_the_label_is_the_largest_logit_even_where_probabilities_round_together() -> None:
    logits = np.array([1.0, 1.0001, 1.0, 1.0], np.float32)
    found = decide(logits, _manifest(temperature=1e6), 2)
    assert len(set(softmax(logits, 1e6).tolist())) == 1
    assert found.index == 1


@pytest.mark.parametrize("temperature", [1e-50, 1e-3, 1e30])
def test_any_positive_temperature_gives_probabilities(temperature: float) -> None:
    found = softmax(np.array([1, 2, 3], np.float32), temperature)
    assert np.isfinite(found).all()
    assert float(found.sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("top_k", [1, 4, 5, 1000])
def test_top_k_ends_with_the_classes(top_k: int) -> None:
    found = decide(_logits_of(0.1, 0.2, 0.3, 0.4), _manifest(), top_k)
    assert [c.index for c in found.top_k] == [3, 2, 1, 0][:top_k]


def test_one_class_is_always_sure() -> None:
    assert decide(np.array([-7], np.float32), _manifest(("only",)), 5).top_k == (ClassProbability("only", 0, 1.0),)


@pytest.mark.parametrize(
    ("threshold", "rejected"), [(None, False), (0.0, False), (0.5, False), (0.51, True), (1.0, True)]
)
def test_rejection_is_below_the_threshold_only(threshold: float | None, rejected: bool) -> None:
    found = decide(np.zeros(2, np.float32), _manifest(("a", "b"), threshold=threshold), 1)
    assert found.confidence == 0.5
    assert found.rejected is rejected
    assert found.label == "a"


FINE = TaxonomyLevel(name="genus", groups=("x", "x", "y", "y"))
COARSE = TaxonomyLevel(name="family", groups=("f", "f", "f", "g"))


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        (0.40, None),  # not rejected: class a has 0.4
        (0.60, Rollup("genus", "x", 0.7)),  # a + b
        (0.75, Rollup("family", "f", 0.9)),  # a + b + c
        (0.95, None),  # no level is sure enough
    ],
)
def test_roll_up_takes_the_finest_sure_group(threshold: float, expected: Rollup | None) -> None:
    found = decide(_logits_of(0.4, 0.3, 0.2, 0.1), _manifest(threshold=threshold, taxonomy=(FINE, COARSE)), 1)
    assert found.rejected is (threshold > 0.4)
    if expected is None:
        assert found.rollup is None
    else:
        assert found.rollup is not None
        assert (found.rollup.level, found.rollup.group) == (expected.level, expected.group)
        assert found.rollup.confidence == pytest.approx(expected.confidence, abs=1e-6)


def test_roll_up_can_leave_the_best_class_group() -> None:
    """Two classes of group y outweigh the single best class of group x: what is asked is the surest group."""
    level = TaxonomyLevel(name="genus", groups=("x", "y", "y"))
    found = decide(_logits_of(0.4, 0.3, 0.3), _manifest(("a", "b", "c"), threshold=0.55, taxonomy=(level,)), 1)
    assert found.label == "a"
    assert found.rollup is not None
    assert found.rollup.group == "y"


def test_roll_up_confidence_stays_a_probability() -> None:
    labels = tuple(str(i) for i in range(1000))
    level = TaxonomyLevel(name="all", groups=("one",) * 1000)
    logits = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    found = decide(logits, _manifest(labels, threshold=0.999, taxonomy=(level,)), 1)
    assert found.rollup is not None
    assert 0.999 < found.rollup.confidence <= 1.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 3])
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_logits_that_are_no_numbers_are_never_a_prediction(bad: float, place: int, threshold: float | None) -> None:
    logits = np.array([1, 2, 3, 4], np.float32)
    logits[place] = bad
    with pytest.raises(InferenceError, match=r"m\.null returned logits that are not finite") as caught:
        decide(logits, _manifest(threshold=threshold), 2)
    assert isinstance(caught.value, EdgefgError)
    assert f"class {place}" in str(caught.value)


def test_prediction_is_frozen() -> None:
    found = decide(_logits_of(0.9, 0.1), _manifest(("a", "b")), 1)
    assert isinstance(found, Prediction)
    for name in found.__struct_fields__:
        with pytest.raises(AttributeError, match="immutable"):
            setattr(found, name, None)
    with pytest.raises(AttributeError):
        found.extra = 1  # type: ignore[attr-defined]
    assert isinstance(msgspec.structs.replace(found, label="b"), Prediction)
