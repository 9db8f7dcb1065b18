from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgefg.export.distill.losses import (
    attention_distance,
    dist,
    dkd,
    feature_distance,
    kl_divergence,
    pearson_distance,
)

TARGET = torch.tensor([0, 2, 1])
LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "kl": kl_divergence,
    "dkd": lambda student, teacher, *t: dkd(student, teacher, TARGET, *t),
    "dist": dist,
}
SEEDS = st.integers(0, 10_000)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return (p * np.log(p / q)).sum(axis=1)


def logits(seed: int, scale: float = 2.0, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    pair = scale * np.random.default_rng(seed).normal(size=(2, len(TARGET), classes))
    return torch.from_numpy(pair[0]), torch.from_numpy(pair[1])


def test_kl_by_hand() -> None:
    teacher = np.array([[2.0, 0.0, -1.0], [0.5, 0.5, 3.0]])
    student = np.array([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    expected = 4 * kl(softmax(teacher / 2), softmax(student / 2)).mean()
    assert kl_divergence(torch.from_numpy(student), torch.from_numpy(teacher), 2.0).item() == pytest.approx(expected)


def test_dkd_by_hand() -> None:
    # Probabilities: teacher 1/2, 1/4, 1/4; student 1/4, 1/2, 1/4.
    teacher, student = torch.tensor([[2.0, 1.0, 1.0]]).log(), torch.tensor([[1.0, 2.0, 1.0]]).log()
    pair = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    others = 0.5 * np.log(0.5 / (2 / 3)) + 0.5 * np.log(0.5 / (1 / 3))
    found = dkd(student, teacher, torch.tensor([0]), alpha=3.0, beta=5.0).item()
    assert found == pytest.approx(3 * pair + 5 * others, rel=1e-6)


def test_dist_by_hand() -> None:
    # Probabilities 3/4, 1/4 and 1/4, 3/4 against their mirror image: of two classes every correlation is ±1.
    teacher = torch.tensor([[3.0, 1.0], [1.0, 3.0]]).log()
    assert dist(teacher.flip(1), teacher, beta=3.0, gamma=5.0).item() == pytest.approx(2 * 3 + 2 * 5, rel=1e-6)
    # A student that is less sure, but of the same order, is as good as equal.
    assert dist(teacher / 3, teacher).item() == pytest.approx(0, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, temperature=st.floats(0.5, 5))
def test_dkd_and_dist_are_the_papers_formulas(seed: int, temperature: float) -> None:
    student, teacher = logits(seed)
    q, p = (softmax(x.numpy() / temperature) for x in (student, teacher))
    rows = np.arange(len(TARGET))
    pt, qt = p[rows, TARGET], q[rows, TARGET]
    pairs = kl(np.stack([pt, 1 - pt], 1), np.stack([qt, 1 - qt], 1))
    mask = np.eye(4, dtype=bool)[TARGET]
    others = kl(*((x[~mask] / (1 - x[mask]).repeat(3)).reshape(-1, 3) for x in (p, q)))
    expected = temperature**2 * (pairs + 8 * others).mean()
    assert dkd(student, teacher, TARGET, temperature).item() == pytest.approx(expected, rel=1e-6)
    inter = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q, p, strict=True)])
    intra = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q.T, p.T, strict=True)])
    expected = temperature**2 * (2 * inter + 2 * intra)
    assert dist(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS)
def test_dkd_weighed_by_what_the_teacher_leaves_is_kd(seed: int) -> None:
    """Equation 6: KD = TCKD + (1 − p)·NCKD, image by image."""
    student, teacher = logits(seed)
    for s, t, target in zip(student, teacher, TARGET, strict=True):
        left = 1 - torch.softmax(t, 0)[target].item()
        found = dkd(s[None], t[None], target[None], alpha=1.0, beta=left)
        assert found.item() == pytest.approx(kl_divergence(s[None], t[None]).item(), rel=1e-6)


def test_dkd_of_two_classes_has_no_others() -> None:
    student, teacher = (x[:, :2] for x in logits(3))
    target = torch.tensor([0, 1, 1])
    assert dkd(student, teacher, target).item() == pytest.approx(kl_divergence(student, teacher).item())


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, shift=st.floats(-50, 50), temperature=st.floats(0.5, 5))
def test_zero_at_equality_above_it_elsewhere_and_blind_to_a_row_s_shift(
    name: str, seed: int, shift: float, temperature: float
) -> None:
    student, teacher = logits(seed)
    loss = LOSSES[name]
    assert loss(teacher, teacher, temperature).item() == pytest.approx(0, abs=1e-9)
    apart = loss(student, teacher, temperature).item()
    assert apart > 0
    shifts = shift * torch.tensor([[1.0], [0.0], [-0.5]])
    assert loss(student + shifts, teacher - shifts, temperature).item() == pytest.approx(apart, rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, scale=st.floats(0.01, 100), shift=st.floats(-10, 10))
def test_pearson_distance_is_blind_to_shift_and_scale(seed: int, scale: float, shift: float) -> None:
    one, other = logits(seed)
    found = pearson_distance(one, other)
    assert torch.allclose(pearson_distance(scale * one + shift, other), found, atol=1e-8)
    assert torch.allclose(pearson_distance(-one, other), 2 - found, atol=1e-8)


@pytest.mark.parametrize("sure", [30.0, 300.0, 3e4])
@pytest.mark.parametrize("name", LOSSES)
def test_slopes_are_finite_where_either_is_sure(name: str, sure: float) -> None:
    certain = sure * torch.eye(3)[TARGET]
    for student, teacher in (
        (certain, certain), (certain, certain.roll(1, 1)), (certain, torch.zeros(3, 3)), (torch.zeros(3, 3), certain),
    ):  # fmt: skip
        student = student.clone().requires_grad_()
        loss = LOSSES[name](student, teacher)
        loss.backward()
        assert loss.isfinite()
        assert student.grad is not None
        assert student.grad.isfinite().all()


def test_dkd_sees_the_others_of_a_teacher_who_is_sure() -> None:
    # 1 − p of this teacher is 2e-22, which float32 cannot tell from 0; among the others it is 0.73 to 0.27.
    teacher, student = torch.tensor([[50.0, 1.0, 0.0]]), torch.tensor([[50.0, 0.0, 1.0]])
    p = softmax(np.array([[1.0, 0.0]]))
    assert dkd(student, teacher, torch.tensor([0]), beta=1.0).item() == pytest.approx(kl(p, p[:, ::-1])[0], rel=1e-5)


def test_feature_distance_by_hand() -> None:
    student = torch.tensor([[3.0, 1.0], [4.0, 0.0]]).view(1, 2, 1, 2)
    teacher = torch.tensor([[5.0, 0.0], [0.0, 2.0]]).view(1, 2, 1, 2)
    # (3, 4)/5 against (1, 0), and (1, 0) against (0, 1).
    assert feature_distance(student, teacher).item() == pytest.approx(((0.4**2 + 0.8**2) + 2) / 2)
    assert feature_distance(7 * teacher, teacher).item() == pytest.approx(0)
    # The teacher's finer grid is averaged: two columns become one.
    coarse = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    assert feature_distance(coarse, teacher).item() == pytest.approx(2 - 2 * 2.5 / np.hypot(2.5, 1), rel=1e-6)


def test_attention_distance_by_hand() -> None:
    # Sums of squares: 25 and 0 of two channels, 0 and 9 of one.
    student = torch.tensor([[3.0, 0.0], [4.0, 0.0]]).view(1, 2, 1, 2)
    teacher = torch.tensor([[0.0, -3.0]]).view(1, 1, 1, 2)
    assert attention_distance(student, teacher).item() == pytest.approx(2**0.5)
    assert attention_distance(-2 * student, student[:, :1]).item() == 0


def test_slopes_of_map_losses_are_finite_where_maps_are_empty_or_equal() -> None:
    full = torch.rand(2, 3, 2, 2)
    for loss in (feature_distance, attention_distance):
        for student in (torch.zeros(2, 3, 2, 2), full):
            student = student.clone().requires_grad_()
            loss(student, full).backward()
            assert student.grad is not None
            assert student.grad.isfinite().all()
