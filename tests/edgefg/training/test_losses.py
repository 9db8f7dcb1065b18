from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgefg.training.losses import CenterLoss, TripletLoss


def moved_by_the_paper(centres: np.ndarray, x: np.ndarray, y: np.ndarray, alpha: float) -> np.ndarray:
    """Equation 4, class by class."""
    out = centres.copy()
    for j in range(len(centres)):
        own = x[y == j]
        out[j] -= alpha * (centres[j] - own).sum(axis=0) / (1 + len(own))
    return out


def test_center_loss_by_hand_duplicates_included() -> None:
    loss = CenterLoss(3, 2)
    x, y = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]]), torch.tensor([1, 2, 1])
    assert loss(x, y).item() == pytest.approx(0.5 * (25 + 1 + 4) / 3)
    # Class 1 has two images: 0.5 · (3 + 0, 4 + 2) / (1 + 2); class 2 one: 0.5 · (1, 0) / (1 + 1); class 0 none.
    np.testing.assert_allclose(loss.centres.numpy(), np.array([[0, 0], [0.5, 1.0], [0.25, 0]]), rtol=1e-6)


@settings(max_examples=50, deadline=None)
@given(labels=st.lists(st.integers(0, 3), min_size=1, max_size=12), seed=st.integers(0, 1000), alpha=st.floats(0.1, 1))
def test_the_centres_follow_the_paper_s_rule(labels: list[int], seed: int, alpha: float) -> None:
    generator = np.random.default_rng(seed)
    loss = CenterLoss(4, 5, alpha)
    loss.centres.copy_(torch.from_numpy(generator.normal(size=(4, 5))))
    centres, y = loss.centres.numpy().copy(), np.array(labels)
    x = generator.normal(size=(len(y), 5)).astype(np.float32)
    found = loss(torch.from_numpy(x), torch.from_numpy(y)).item()
    assert found == pytest.approx(0.5 * np.square(x - centres[y]).sum(axis=1).mean(), rel=1e-4)
    np.testing.assert_allclose(loss.centres.numpy(), moved_by_the_paper(centres, x, y, alpha), atol=1e-5)


def test_only_embeddings_get_a_gradient_and_centres_rest_in_evaluation() -> None:
    loss = CenterLoss(2, 3)
    x = torch.ones(2, 3, requires_grad=True)
    loss(x, torch.tensor([0, 0])).backward()
    # (x - c) / N, with the centre before it moved.
    np.testing.assert_allclose(x.grad.numpy(), np.full((2, 3), 0.5))
    assert not list(loss.parameters())
    assert "centres" in loss.state_dict()
    before = loss.centres.clone()
    loss.eval()(x, torch.tensor([1, 0]))
    assert torch.equal(loss.centres, before)


def distances(x: np.ndarray) -> np.ndarray:
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    return np.linalg.norm(x[:, None] - x[None], axis=2)


def triplets(x: np.ndarray, y: np.ndarray, mining: str, margin: float) -> float:
    """The formula in NumPy: the mean of the positive terms of the mined triplets."""
    d, terms = distances(x), []
    for a in range(len(y)):
        positives = [i for i in range(len(y)) if y[i] == y[a] and i != a]
        negatives = [i for i in range(len(y)) if y[i] != y[a]]
        if not positives or not negatives:
            continue
        if mining == "hard":
            terms.append(max(d[a, p] for p in positives) - min(d[a, n] for n in negatives) + margin)
        else:
            gaps = [d[a, n] - d[a, p] for p in positives for n in negatives]
            terms += [margin - gap for gap in gaps if 0 < gap <= margin]
    terms = [term for term in terms if term > 0]
    return float(np.mean(terms)) if terms else 0.0


@pytest.mark.parametrize("mining", ["hard", "semihard"])
@settings(max_examples=30, deadline=None)
@given(labels=st.lists(st.integers(0, 2), min_size=2, max_size=10), seed=st.integers(0, 1000))
def test_triplet_loss_is_the_formula(mining: Any, labels: list[int], seed: int) -> None:
    x, y = np.random.default_rng(seed).normal(size=(len(labels), 3)), np.array(labels)
    found = TripletLoss(mining)(torch.from_numpy(x), torch.from_numpy(y)).item()
    assert found == pytest.approx(triplets(x, y, mining, 0.2), abs=1e-4)


def test_triplet_loss_by_hand() -> None:
    # At length 1: (1, 0), (0, 1) are one class, (0.6, 0.8) the other; only the first two have a positive.
    x = torch.tensor([[2.0, 0.0], [0.0, 5.0], [0.6, 0.8]])
    to_negative = [np.hypot(0.4, 0.8), np.hypot(0.6, 0.2)]
    expected = np.mean([np.sqrt(2) - distance + 0.2 for distance in to_negative])
    assert TripletLoss()(x, torch.tensor([0, 0, 1])).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2]])
def test_a_batch_without_triplets_has_loss_zero_and_a_gradient(labels: list[int]) -> None:
    x = torch.randn(3, 4, requires_grad=True)
    loss = TripletLoss()(x, torch.tensor(labels))
    loss.backward()
    assert loss.item() == 0
    assert not x.grad.any()


def test_equal_embeddings_have_a_finite_gradient() -> None:
    x = torch.ones(4, 3, requires_grad=True)
    loss = TripletLoss()(x, torch.tensor([0, 0, 1, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(0.2)
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
