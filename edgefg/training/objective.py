"""What one training step minimises: the method's own loss and the recipe's ingredients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from edgefg.training.losses import cross_entropy
from edgefg.training.models.network import Batch, Network, Step
from edgefg.training.recipe import Recipe

# (network, batch) → (loss, logits). Where it is an nn.Module, its buffers are part of the run's state.
Objective = Callable[[nn.Module, Batch], tuple[torch.Tensor, torch.Tensor]]


class TeacherObjective(nn.Module):
    """The loss of a teacher in training.

    Args:
        recipe: its label smoothing and ingredients are used.
        network: the network that will be trained, for the size of its embedding.
        classes: number of classes.
    """

    def __init__(self, recipe: Recipe, network: Network, classes: int) -> None:
        super().__init__()
        self._criterion = cross_entropy(recipe.label_smoothing)

    def forward(self, network: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss and the logits of a batch."""
        # Typed as Any: under Fabric the network is wrapped.
        step: Step = cast(Any, network).loss(batch, self._criterion)
        return step.loss, step.logits
