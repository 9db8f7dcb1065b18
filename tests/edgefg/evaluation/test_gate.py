"""The gate: its figures against values by hand, and what its limits let pass and what they do not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgefg.artifact.manifest import ClassDrop, Comparison
from edgefg.errors import ParityError
from edgefg.evaluation import gate as gates
from edgefg.evaluation.gate import Verdict, chance_of, compare, paired_error
from edgefg.settings.gate import Gate

Labels = Sequence[int] | npt.NDArray[np.int64]
OPEN = Gate(max_drop=100, max_class_drop=100, max_flips=100)


def logits_of(answers: Labels, classes: int) -> npt.NDArray[np.float32]:
    return 5 * np.eye(classes, dtype=np.float32)[np.asarray(answers)]


def judge(artifact: Labels, parent: Labels, labels: Labels, classes: int, gate: Gate | None = None) -> Verdict:
    names = tuple(f"c{i}" for i in range(classes))
    return compare(
        logits_of(artifact, classes), logits_of(parent, classes), np.asarray(labels), names, "val of x", gate or Gate()
    )


def test_figures_by_hand() -> None:
    labels = [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    parent = [0, 0, 0, 0, 1, 1, 0, 2, 0, 0]  # 7 right
    artifact = [1, 1, 2, 0, 1, 0, 0, 2, 2, 1]  # 4 right
    found = judge(artifact, parent, labels, 3, OPEN).comparison
    assert (found.lost, found.gained) == (4, 1)
    assert found.drop == pytest.approx(30)
    assert found.drop_error == pytest.approx(100 * math.sqrt(7 - 9 / 12) / 12)
    assert (found.drop_low, found.drop_high) == pytest.approx(
        (25 - 1.96 * found.drop_error, 25 + 1.96 * found.drop_error), abs=1e-2
    )
    assert found.mcnemar_p == pytest.approx(2 * (1 + 5) / 32)
    assert found.agreement == pytest.approx(0.4)
    assert (found.parent.images, found.parent.top1) == (10, 0.7)
    assert [(d.label, d.images, d.parent_recall, d.recall) for d in found.worst] == [
        ("c0", 4, 1.0, 0.25), ("c1", 3, pytest.approx(2 / 3), pytest.approx(1 / 3)),
    ]  # fmt: skip
    # The image of c2 that the parent had wrong too is no flip.
    assert [(f.label, f.predicted, f.images) for f in found.flips] == [
        ("c0", "c1", 2),
        ("c0", "c2", 1),
        ("c1", "c0", 1),
    ]
    assert (found.logits, found.parent_logits_max, found.gate) == (5, 5, OPEN)


@pytest.mark.parametrize(
    ("lost", "images", "classes"), [(2, 2, 80), (3, 3, 10), (4, 12, 81), (7, 40, 5), (3, 2000, 1), (35, 2000, 1)]
)
def test_chance_is_the_binomial_tail_over_all_classes(lost: int, images: int, classes: int) -> None:
    p = Fraction(2, 100)
    tail = sum(math.comb(images, k) * p**k * (1 - p) ** (images - k) for k in range(lost, images + 1))
    assert chance_of(lost, images, classes) == pytest.approx(min(1.0, float(tail * classes)), rel=1e-9)


def test_chance_of_many_thousand_images_neither_overflows_nor_vanishes() -> None:
    assert 0.4 < chance_of(20_000, 1_000_000, 1) < 0.6
    assert chance_of(50_000, 1_000_000, 100) == 0
    assert chance_of(3, 1_000_000, 1) == 1


def test_one_image_is_no_finding_nor_are_two_of_more() -> None:
    assert chance_of(1, 1, 1) == chance_of(1, 5000, 3) == chance_of(2, 3, 2) == 1
    assert chance_of(2, 2, 2) < 0.01


@given(st.integers(0, 40), st.integers(0, 40), st.integers(80, 500))
def test_the_error_turns_with_the_drop_and_is_never_zero(lost: int, gained: int, images: int) -> None:
    middle, error = paired_error(lost, gained, images)
    assert error > 0
    assert middle == pytest.approx((lost - gained) / (images + 2))
    assert paired_error(gained, lost, images) == pytest.approx((-middle, error))


def test_the_interval_covers_the_true_drop() -> None:
    """What 95 % promises, for rates as low as those of INT8: 2 % lost, 1 % gained, 300 images."""
    draws = np.random.default_rng(0).multinomial(300, [0.02, 0.01, 0.97], size=4000)
    found = [paired_error(int(a), int(b), 300) for a, b, _ in draws]
    assert 0.94 <= np.mean([abs(middle - 0.01) <= 1.96 * error for middle, error in found]) <= 0.99


def _split(classes: int, each: int, right: float, seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Labels and a parent's answers, wrong ones among them."""
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), each)
    parent = np.where(generator.random(len(labels)) < right, labels, (labels + 1) % classes)
    return labels, parent


def _sound(parent: npt.NDArray[np.int64], labels: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.int64]:
    """An INT8 artifact as measured: of both kinds, right and wrong, 1 % of all images change."""
    generator = np.random.default_rng([seed, 1])
    classes = int(labels.max()) + 1
    right = parent == labels
    turned = generator.random(len(labels)) < np.where(right, 0.012, 0.03)
    return np.where(turned, np.where(right, (labels + 2) % classes, labels), parent)


@pytest.mark.parametrize(("classes", "each"), [(2, 150), (8, 37), (80, 4)])
def test_the_defaults_pass_sound_artifacts_on_300_images(classes: int, each: int) -> None:
    failed = 0
    for seed in range(200):
        labels, parent = _split(classes, each, 0.8, seed)
        failed += bool(judge(_sound(parent, labels, seed), parent, labels, classes).failures)
    assert failed <= 4, "one in fifty"


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([(2, 150), (8, 37), (30, 10), (80, 4)]), st.integers(0, 10**6))
def test_the_defaults_fail_an_artifact_that_lost_a_class(size: tuple[int, int], seed: int) -> None:
    classes, each = size
    labels, parent = _split(classes, each, 0.9, seed)
    artifact = _sound(parent, labels, seed)
    counts = np.bincount(labels[parent == labels], minlength=classes)
    victim = int(np.flatnonzero(counts >= 2)[seed % (counts >= 2).sum()])
    artifact = np.where((labels == victim) & (artifact == victim), (victim + 1) % classes, artifact)
    failures = judge(artifact, parent, labels, classes).failures
    assert any("of recall" in failure and f"c{victim}: recall" in failure for failure in failures)


def test_a_single_image_fails_no_class_however_small() -> None:
    labels = [*range(4), *[0] * 96]
    artifact = [0, 2, 2, 3, *[0] * 96]
    found, _, failures = judge(artifact, labels, labels, 4, msgspec.structs.replace(OPEN, max_class_drop=0))
    assert found.worst == (ClassDrop(label="c1", images=1, parent_recall=1, recall=0, chance=1),)
    assert failures == ()


def test_many_lost_images_of_a_large_class_fail_by_points_alone() -> None:
    labels = [0] * 1000 + [1] * 1000
    artifact = [1] * 90 + [0] * 910 + [1] * 1000
    gate = msgspec.structs.replace(OPEN, max_class_drop=10)
    assert judge(artifact, labels, labels, 2, gate).failures == ()
    (failure,) = judge(artifact, labels, labels, 2, msgspec.structs.replace(gate, max_class_drop=8)).failures
    assert failure == (
        "a class loses more than 8 points of recall on val of x (2000 images): c0: recall 100.0% → 91.0% of 1000 images"
    )


@pytest.mark.parametrize(
    ("lost", "images", "fails"),
    [
        *((5, 300, False), (6, 300, True), (11, 1000, False), (15, 1000, True)),
        *((1, 16, False), (3, 16, True), (2, 32, False), (3, 32, True)),
    ],
)
def test_the_mean_may_exceed_its_limit_by_a_standard_error(lost: int, images: int, fails: bool) -> None:
    labels = [i % 4 for i in range(images)]
    artifact = [(label + 1) % 4 if i < lost else label for i, label in enumerate(labels)]
    gate = msgspec.structs.replace(OPEN, max_drop=1)
    failures = judge(artifact, labels, labels, 4, gate).failures
    assert [failure.startswith("top-1 drops by") for failure in failures] == [True] * fails


def test_a_limit_of_zero_leaves_no_more_than_chance() -> None:
    labels = [0, 1] * 150
    strict = msgspec.structs.replace(OPEN, max_drop=0)
    assert judge(labels, labels, labels, 2, strict).failures == ()
    assert judge([1, *labels[1:]], labels, labels, 2, strict).failures == ()
    assert "worst class: c0" in judge([1, 1, 1, 1, 1, *labels[5:]], labels, labels, 2, strict).failures[0]
    assert judge(labels, labels, labels, 2, msgspec.structs.replace(OPEN, max_drop=-1)).failures


@pytest.mark.parametrize(("limit", "fails"), [(0, True), (2, True), (3, True), (4, False)])
def test_flips_may_exceed_their_limit_by_a_standard_error(limit: float, fails: bool) -> None:
    labels = [0, 1] * 50
    artifact = [1, 0, 1, 0, 1, 0, *labels[6:]]  # 6 ± 2.4
    failures = judge(artifact, labels, labels, 2, msgspec.structs.replace(OPEN, max_flips=limit)).failures
    assert [" flip on " in failure for failure in failures] == [True] * fails


def test_flips_count_though_as_many_images_are_gained() -> None:
    labels = [0] * 50 + [1] * 50
    parent = [0] * 44 + [1] * 6 + [1] * 50
    artifact = [0] * 50 + [0] * 6 + [1] * 44
    found, _, failures = judge(artifact, parent, labels, 2, msgspec.structs.replace(OPEN, max_flips=3))
    assert (found.drop, found.mcnemar_p) == (0, 1)
    assert failures == (
        "6 images that the parent has right flip on val of x (100 images), allowed are 3 %: c1 → c0 (6)",
    )
    assert judge(artifact, parent, labels, 2, msgspec.structs.replace(OPEN, max_flips=4)).failures == ()


def test_agreement_counts_wrong_answers_too() -> None:
    labels, parent, artifact = [0] * 10, [1] * 10, [2] * 10
    assert judge(artifact, parent, labels, 3, OPEN).failures == ()
    (failure,) = judge(artifact, parent, labels, 3, msgspec.structs.replace(OPEN, min_agreement=0.5)).failures
    assert failure == "artifact and parent agree on 0.00% of 10 images, required are 50.00%"


def test_many_lost_classes_are_named_as_far_as_a_line_holds() -> None:
    labels = [i for i in range(14) for _ in range(10)]
    artifact = [13 if label < 12 else label for label in labels]
    found, _, failures = judge(artifact, labels, labels, 14, msgspec.structs.replace(OPEN, max_class_drop=10))
    assert failures[0].startswith("12 classes lose more than 10 points of recall")
    assert failures[0].endswith("c9: recall 100.0% → 0.0% of 10 images and 2 more")
    assert (len(found.worst), len(found.flips)) == (12, 5)


def test_what_was_only_measured_can_be_judged_later() -> None:
    """The manifest keeps every class whose loss chance does not explain, however many they are."""
    labels = np.repeat(np.arange(9), 40)
    parent = labels.copy()
    artifact = labels.copy()
    for label in range(9):  # eight large losses that the limit allows, and one that it does not
        lost = 14 if label < 8 else 24
        artifact[40 * label : 40 * label + lost] = (label + 1) % 9
    gate = Gate(max_drop=100, max_class_drop=50, max_flips=100)
    measured = compare(
        logits_of(artifact.tolist(), 9), logits_of(parent.tolist(), 9), labels, tuple("abcdefghi"), "val of x", None
    )
    assert not measured.failures
    assert len(measured.comparison.worst) == len(measured.classes) == 9
    [failure] = gates.judge(msgspec.json.decode(msgspec.json.encode(measured.comparison), type=Comparison), gate)
    assert "a class loses more than 50 points" in failure
    assert "i: recall 100.0% → 40.0% of 40 images" in failure


def test_without_a_gate_nothing_fails() -> None:
    names, labels = ("a", "b"), np.zeros(50, np.int64)
    logits = logits_of(labels, 2)
    found, classes, failures = compare(-logits, logits, labels, names, "x", None)
    assert (failures, found.drop, found.gate) == ((), 100, None)
    assert [(drop.label, drop.recall, drop.parent_recall) for drop in classes] == [("a", 0, 1)]


def test_a_class_without_images_is_no_matter() -> None:
    found, _, failures = judge([0, 0], [0, 0], [0, 0], 3)
    assert (found.worst, found.flips, found.drop, failures) == ((), (), 0, ())
    assert len(found.render().splitlines()) == 2


@pytest.mark.parametrize("broken", [0, 1])
def test_logits_that_are_not_finite_are_refused(broken: int) -> None:
    pair = [logits_of([0, 1], 2), logits_of([0, 1], 2)]
    pair[broken][1, 0] = np.nan
    with pytest.raises(ParityError, match="not finite"):
        compare(pair[0], pair[1], np.array([0, 1]), ("a", "b"), "x", OPEN)


def test_lines_for_people() -> None:
    labels = [0] * 20 + [1] * 20
    artifact = [1] * 5 + [0] * 15 + [1] * 20
    lines = judge(artifact, labels, labels, 2, OPEN).comparison.render().splitlines()
    assert lines[0].startswith("drop +12.50 points (95 %: ")
    assert "5 images lost, 0 gained, McNemar p = 0.062), top-1 agreement 87.50%" in lines[0]
    assert lines[2:] == ["  c0: recall 100.0% → 75.0% of 20 images", "  flips: c0 → c1 (5)"]
