"""What one training step minimises: the method's own loss and the config's ingredients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from edgefg.errors import TrainingError
from edgefg.settings.training import TrainingConfig
from edgefg.training.data.mix import evaluating, mixer_of
from edgefg.training.losses import CenterLoss, TripletLoss, cross_entropy
from edgefg.training.models.network import Batch, Network, Step

# (network, batch) → (loss, logits). Where it is an nn.Module, its parameters learn along; they and its buffers are part
# of the run's state, never of the checkpoint.
Objective = Callable[[nn.Module, Batch], tuple[torch.Tensor, torch.Tensor]]


class TeacherObjective(nn.Module):
    """The loss of a teacher in training.

    Args:
        config: its label smoothing, mixing, center and triplet loss are used.
        network: the network that will be trained, for the size of its embedding.
        classes: number of classes.

    Raises:
        TrainingError: ingredients that do not go together, or that the network cannot take.
    """

    def __init__(self, config: TrainingConfig, network: Network, classes: int) -> None:
        super().__init__()
        _check(config, network)
        self._criterion = cross_entropy(config.schedule.label_smoothing)
        self._mix = mixer_of(config.augmentation, network, classes)
        self._weights = (config.metric_learning.center_weight, config.metric_learning.triplet_weight)
        self.center: CenterLoss | None = None
        self.triplet: TripletLoss | None = None
        if config.metric_learning.center_weight:
            self.center = CenterLoss(classes, _embedding_width(network, config.image_size))
        if config.metric_learning.triplet_weight:
            self.triplet = TripletLoss(config.metric_learning.mining)

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


def _check(config: TrainingConfig, network: Network) -> None:
    mix, metric = config.augmentation.mix, config.metric_learning
    if mix != "none" and network.needs_boxes:
        raise TrainingError(
            f"--mix {mix} cannot be used with {type(network).__name__}, which needs boxes of parts: mixed images have"
            " none. Remove --mix"
        )
    if mix != "none" and (metric.center_weight or metric.triplet_weight):
        raise TrainingError(
            f"--mix {mix} cannot be combined with a center or triplet loss, because a mixed image has no single class."
            " Remove --mix, or --center-weight and --triplet-weight"
        )
    if metric.triplet_weight and metric.sampler != "pk":
        raise TrainingError(
            f"--triplet-weight needs several images of a class in each batch, which --sampler {metric.sampler} does not"
            " provide. Add --sampler pk"
        )


@torch.no_grad()
def _embedding_width(network: Network, size: int) -> int:
    device = next(network.parameters()).device
    with evaluating(network):
        return network.features(torch.zeros(1, size, size, 3, dtype=torch.uint8, device=device)).shape[1]
