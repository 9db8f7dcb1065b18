"""Objectives: what a training step minimises."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from edgefg.errors import TrainingError
from edgefg.settings.training import TrainingConfig
from edgefg.training.data.mix import create_mixer, evaluating
from edgefg.training.losses import CenterLoss, TripletLoss, cross_entropy
from edgefg.training.models.network import Batch, Network, Step


class Objective(nn.Module):
    """Loss of a training step.

    Its parameters, if it has any, are trained together with the network's. The run's state holds them and its buffers;
    the checkpoint does not.
    """

    def forward(self, network: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss, a scalar, and the logits of a batch. ``network`` may be wrapped by Fabric."""
        raise NotImplementedError

    def crop_size(self, size: int) -> int:
        """Begin an epoch whose training crops have ``size`` pixels; return the size in which to load them."""
        return size


class TeacherObjective(Objective):
    """The loss of a network that learns from labels: that of its method, and the losses on embeddings.

    Args:
        config: label smoothing, mixing and metric learning are used.
        network: the network to train, for the size of its embedding.
        classes: number of classes.

    Raises:
        TrainingError: losses that exclude each other, or that the network does not support.
    """

    def __init__(self, config: TrainingConfig, network: Network, classes: int) -> None:
        super().__init__()
        _check(config, network)
        self._criterion = cross_entropy(config.schedule.label_smoothing)
        self._mix = create_mixer(config.augmentation, network, classes)
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
        # Any: the network may be wrapped by Fabric.
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
