"""What one training step minimises: the method's own loss and the recipe's ingredients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from edgefg.errors import TrainingError
from edgefg.settings.training import Recipe
from edgefg.training.data.mix import evaluating, mixer_of
from edgefg.training.losses import CenterLoss, TripletLoss, cross_entropy
from edgefg.training.models.network import Batch, Network, Step

# (network, batch) → (loss, logits). Where it is an nn.Module, its parameters learn along; they and its buffers are part
# of the run's state, never of the checkpoint.
Objective = Callable[[nn.Module, Batch], tuple[torch.Tensor, torch.Tensor]]


class TeacherObjective(nn.Module):
    """The loss of a teacher in training.

    Args:
        recipe: its label smoothing, mixing, center and triplet loss are used.
        network: the network that will be trained, for the size of its embedding.
        classes: number of classes.

    Raises:
        TrainingError: ingredients that do not go together, or that the network cannot take.
    """

    def __init__(self, recipe: Recipe, network: Network, classes: int) -> None:
        super().__init__()
        _check(recipe, network)
        self._criterion = cross_entropy(recipe.label_smoothing)
        self._mix = mixer_of(recipe, network, classes)
        self._weights = (recipe.center_weight, recipe.triplet_weight)
        self.center: CenterLoss | None = None
        self.triplet: TripletLoss | None = None
        if recipe.center_weight:
            self.center = CenterLoss(classes, _embedding_width(network, recipe.image_size))
        if recipe.triplet_weight:
            self.triplet = TripletLoss(recipe.mining)

    def forward(self, network: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss and the logits of a batch."""
        if self._mix is not None:
            batch = self._mix(network, batch)
        # Typed as Any: under Fabric the network is wrapped.
        step: Step = cast(Any, network).loss(batch, self._criterion)
        loss = step.loss
        for weight, term in zip(self._weights, (self.center, self.triplet), strict=True):
            if term is not None:
                loss = loss + weight * term(step.embedding, batch.labels)
        return loss, step.logits


def _check(recipe: Recipe, network: Network) -> None:
    if recipe.mix != "none" and network.needs_boxes:
        raise TrainingError(
            f"{recipe.mix} was asked for, but {type(network).__name__} learns from boxes of parts, which mixed images"
            " have not; leave out --mix"
        )
    if recipe.mix != "none" and (recipe.center_weight or recipe.triplet_weight):
        raise TrainingError(
            f"{recipe.mix} and a center or triplet loss were asked for, but a mixed image belongs to no one class;"
            " leave out --mix, or --center-weight and --triplet-weight"
        )
    if recipe.triplet_weight and recipe.sampler != "pk":
        raise TrainingError(
            f"a triplet loss was asked for with sampler {recipe.sampler}, whose batches may hold each class once;"
            " add --sampler pk"
        )


@torch.no_grad()
def _embedding_width(network: Network, size: int) -> int:
    device = next(network.parameters()).device
    with evaluating(network):
        return network.features(torch.zeros(1, size, size, 3, dtype=torch.uint8, device=device)).shape[1]
