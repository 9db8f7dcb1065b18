from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from edgefg.training.models.geometry import Constraint, PositionPrior, best_configuration, relative

_NAN = float("nan")


def test_relative_by_hand() -> None:
    place = relative(torch.tensor([20.0, 10, 30, 20]), torch.tensor([0.0, 0, 40, 20]))
    assert place.tolist() == pytest.approx([5 / 40, 5 / 20, math.log(10 / 40), math.log(10 / 20)])


def test_prior_is_numpys_mean_and_covariance_over_several_batches() -> None:
    rng = np.random.default_rng(0)
    corner, side = rng.uniform(0, 50, (60, 3, 2)), rng.uniform(5, 40, (60, 3, 2))
    boxes = torch.tensor(np.concatenate([corner, corner + side], axis=2), dtype=torch.float32)
    boxes[::3, 2] = _NAN
    boxes[5, 0] = _NAN
    prior = PositionPrior(2)
    for start in (0, 7, 30):
        prior.update(boxes[start : {0: 7, 7: 30, 30: 60}[start]])
    places = relative(boxes[:, 1:], boxes[:, :1]).numpy().astype(float)
    objects, found = torch.tensor([[0.0, 0, 50, 50]]), torch.tensor([[[10.0, 10, 30, 30], [5, 5, 9, 9]]])
    log_prior = prior(found, objects)
    for part in range(2):
        own = places[:, part][~np.isnan(places[:, part]).any(axis=1)]
        assert int(prior.count[part]) == len(own)
        np.testing.assert_allclose(prior.mean[part].numpy(), own.mean(axis=0), atol=1e-5)
        covariance = np.cov(own.T, bias=True)
        away = relative(found[0, part], objects[0]).numpy() - own.mean(axis=0)
        wanted = -0.5 * away @ np.linalg.inv(covariance + 1e-3 * np.eye(4)) @ away
        assert float(log_prior[0, 0, part]) == pytest.approx(wanted, rel=1e-3)


def _candidates(*rows: tuple[list[float], float, float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes and (object, part) scores; each candidate has the same box as either."""
    boxes = torch.tensor([[box, box] for box, _, _ in rows], dtype=torch.float32)
    return boxes, torch.tensor([[first, second] for _, first, second in rows])


_BOX_ONLY = Constraint(epsilon=2.0, alpha=0.0, threshold=0.05, objects=10)


def test_a_better_part_outside_the_object_is_not_chosen() -> None:
    boxes, scores = _candidates(
        ([0, 0, 50, 50], 0.9, 0.01), ([10, 10, 20, 20], 0.01, 0.6), ([45, 45, 60, 60], 0.01, 0.95)
    )
    chosen = best_configuration(boxes, scores, PositionPrior(1), _BOX_ONLY)
    assert chosen.tolist() == [[0, 0, 50, 50], [10, 10, 20, 20]]
    lenient = best_configuration(boxes, scores, PositionPrior(1), _BOX_ONLY._replace(epsilon=10.0))
    assert lenient.tolist() == [[0, 0, 50, 50], [45, 45, 60, 60]]


def test_object_and_part_are_chosen_together() -> None:
    # The second best object holds the part: 0.6 · 0.9 > 0.7 · 0.05 (absent counts as the threshold).
    boxes, scores = _candidates(
        ([0, 0, 20, 20], 0.7, 0.01), ([40, 40, 90, 90], 0.6, 0.01), ([50, 50, 60, 60], 0.01, 0.9)
    )
    chosen = best_configuration(boxes, scores, PositionPrior(1), _BOX_ONLY)
    assert chosen.tolist() == [[40, 40, 90, 90], [50, 50, 60, 60]]


def test_the_prior_of_position_decides_between_like_scores() -> None:
    objects = torch.tensor([[0.0, 0, 50, 50]]).expand(20, 4)
    jitter = torch.randn(20, 2, generator=torch.Generator().manual_seed(0)).repeat(1, 2)
    prior = PositionPrior(1)
    prior.update(torch.stack([objects, torch.tensor([5.0, 5, 15, 15]) + jitter], dim=1))
    boxes, scores = _candidates(([0, 0, 50, 50], 0.9, 0.01), ([5, 5, 15, 15], 0.01, 0.6), ([35, 35, 45, 45], 0.01, 0.7))
    assert best_configuration(boxes, scores, prior, _BOX_ONLY)[1].tolist() == [35, 35, 45, 45]
    chosen = best_configuration(boxes, scores, prior, _BOX_ONLY._replace(alpha=0.1))
    assert chosen[1].tolist() == [5, 5, 15, 15]


def test_nothing_is_found_below_the_threshold() -> None:
    boxes, scores = _candidates(([0, 0, 50, 50], 0.9, 0.01), ([5, 5, 15, 15], 0.02, 0.04))
    chosen = best_configuration(boxes, scores, PositionPrior(1), _BOX_ONLY)
    assert chosen.isnan().all(dim=1).tolist() == [False, True]
    assert best_configuration(boxes[:0], scores[:0], PositionPrior(1), _BOX_ONLY).isnan().all()
