"""Prior of part positions, and the best configuration of object and parts (Part R-CNN, section 3.2)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn
from torchvision.ops import nms

# Added to the covariance: the standard deviation is at least 3 % of the object's side, however few the boxes.
_RIDGE = 1e-3
_MIN_BOXES = 5
_SAME_OBJECT = 0.7


class Constraint(NamedTuple):
    """Limits of a configuration of object and parts."""

    epsilon: float
    """Largest distance in pixels by which a part may extend beyond its object."""
    alpha: float
    """Exponent of the position prior. 0: only the box constraint is used."""
    threshold: float
    """A part whose score × prior is lower is absent."""
    objects: int
    """Number of object boxes that are tried."""


class PositionPrior(nn.Module):
    """Gaussian prior of each part's centre and log size relative to its object (δ of equation 3, one component).

    Mean and covariance are those of all training boxes, kept as running moments.

    Args:
        parts: number of parts, without the object.
    """

    count: torch.Tensor
    mean: torch.Tensor
    second: torch.Tensor

    def __init__(self, parts: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(parts))
        self.register_buffer("mean", torch.zeros(parts, 4))
        self.register_buffer("second", torch.zeros(parts, 4, 4))

    @torch.no_grad()
    def update(self, boxes: torch.Tensor) -> None:
        """Update the moments with ground-truth boxes, ``float [N, 1 + parts, 4]``, the object first. NaN: absent."""
        places = relative(boxes[:, 1:], boxes[:, :1])
        seen = ~places.isnan().any(dim=2)
        places = torch.where(seen[..., None], places, 0.0)
        new = seen.sum(dim=0).to(self.count)
        self.count += new
        share = new / self.count.clamp_min(1)
        divisor = new.clamp_min(1)
        mean = places.sum(dim=0) / divisor[:, None]
        second = torch.einsum("npi,npj->pij", places, places) / divisor[:, None, None]
        self.mean += share[:, None] * (mean - self.mean)
        self.second += share[:, None, None] * (second - self.second)

    def forward(self, boxes: torch.Tensor, objects: torch.Tensor) -> torch.Tensor:
        """Return the log prior, ``float [K, R, parts]``, with maximum 0. It is 0 for parts with too few boxes.

        Args:
            boxes: ``float [R, parts, 4]``.
            objects: ``float [K, 4]``.
        """
        covariance = self.second - self.mean[:, :, None] * self.mean[:, None, :]
        covariance = covariance + _RIDGE * torch.eye(4, device=covariance.device)
        away = relative(boxes[None], objects[:, None, None]) - self.mean
        distance = torch.einsum("krpi,pij,krpj->krp", away, torch.linalg.inv(covariance), away)
        return torch.where(self.count >= _MIN_BOXES, -0.5 * distance, 0.0)


def relative(boxes: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """Return centre offset and log size of boxes relative to ``frames``. Both are ``float […, 4]``, and broadcast."""
    size, frame = boxes[..., 2:] - boxes[..., :2], frames[..., 2:] - frames[..., :2]
    offset = (boxes[..., 2:] + boxes[..., :2] - frames[..., 2:] - frames[..., :2]) / 2 / frame.clamp_min(1e-3)
    return torch.cat([offset, (size.clamp_min(1e-3) / frame.clamp_min(1e-3)).log()], dim=-1)


def best_configuration(
    boxes: torch.Tensor, scores: torch.Tensor, prior: PositionPrior, constraint: Constraint
) -> torch.Tensor:
    """Choose object and parts jointly: X* = argmax Δ_box(X) · Π δᵢ(xᵢ)^α · Π dᵢ(xᵢ) (equations 1 to 3).

    Given the object, parts are independent. The maximum is therefore exact.

    Args:
        boxes: ``float [R, 1 + parts, 4]``: boxes of each candidate as the object and as every part, in pixels.
        scores: ``float [R, 1 + parts]``: d, probabilities.
        prior: prior of the part positions.
        constraint: the limits.

    Returns:
        ``float [1 + parts, 4]``. NaN: nothing reaches the threshold.
    """
    # From the shape of the scores: torchvision flattens the boxes if no image of a batch has a candidate.
    nowhere = boxes.new_full((scores.shape[1], 4), torch.nan)
    if not len(boxes):
        return nowhere
    tried = nms(boxes[:, 0], scores[:, 0], _SAME_OBJECT)[: constraint.objects]
    objects, found = boxes[tried, 0], boxes[:, 1:]
    low, high = objects[:, None, None, :2] - found[..., :2], found[..., 2:] - objects[:, None, None, 2:]
    inside = (torch.cat([low, high], dim=3) <= constraint.epsilon).all(dim=3)
    floor = math.log(constraint.threshold)
    value = scores[:, 1:].clamp_min(1e-12).log() + constraint.alpha * prior(found, objects)
    best, which = torch.where(inside, value, -torch.inf).max(dim=1)
    # An absent part counts with the threshold, so that an object is not preferred because its parts are absent.
    object_value = scores[tried, 0].clamp_min(1e-12).log()
    winner = int((object_value + best.clamp_min(floor).sum(dim=1)).argmax())
    chosen = found[which[winner], torch.arange(found.shape[1], device=found.device)]
    result = torch.cat([objects[winner : winner + 1], chosen])
    reached = torch.cat([object_value[winner : winner + 1], best[winner]]) >= floor
    return torch.where(reached[:, None], result, nowhere)
