"""Losses of a batch: classification, and what draws embeddings of a class together."""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import nn
from torch.nn import functional as F

from edgefg.training.models.network import Batch, Criterion


def cross_entropy(label_smoothing: float) -> Criterion:
    """Build cross entropy to the batch's labels, or to its targets where images were mixed; mean over the batch.

    Args:
        label_smoothing: ε of (1-ε)·target + ε/classes (Szegedy et al. 2016, section 7).
    """

    def criterion(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        target = batch.labels if batch.targets is None else batch.targets
        # In float32: half precision loses the small probabilities.
        return F.cross_entropy(logits.float(), target, label_smoothing=label_smoothing)

    return criterion


class CenterLoss(nn.Module):
    """Center loss (Wen et al. 2016): ½‖x − c_y‖², mean over the batch (equation 2, which sums).

    In training the centres move by the paper's rule after the loss is taken, c_j −= α·Δc_j with
    Δc_j = Σ 1(y_i = j)·(c_j − x_i) / (1 + Σ 1(y_i = j)) (equation 4); no gradient reaches them. They begin at zero, are
    part of the run's state, and each process of a distributed run keeps its own.

    Args:
        classes: number of centres.
        width: D, their length.
        alpha: α, how far a centre follows its class.
    """

    centres: torch.Tensor

    def __init__(self, classes: int, width: int, alpha: float = 0.5) -> None:
        super().__init__()
        self._alpha = alpha
        # A buffer, not a parameter: the rule moves it, never the optimiser.
        self.register_buffer("centres", torch.zeros(classes, width))

    def forward(self, embedded: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss of embeddings ``float [N, D]`` with labels ``int64 [N]``, and move the centres."""
        apart = embedded.float() - self.centres[labels]
        if self.training:
            self._move(apart.detach(), labels)
        return 0.5 * apart.square().sum(dim=1).mean()

    @torch.no_grad()
    def _move(self, apart: torch.Tensor, labels: torch.Tensor) -> None:
        counts = torch.bincount(labels, minlength=len(self.centres))
        # index_add_ adds up the images of a class; an assignment by index would keep one of them.
        self.centres.index_add_(0, labels, self._alpha * apart / (1 + counts[labels, None]))


class TripletLoss(nn.Module):
    """Triplet loss (Schroff et al. 2015), max(0, d(a, p) − d(a, n) + margin), mean over the triplets above zero.

    d is the distance of embeddings at length 1. Loss and mining are pytorch-metric-learning's. A batch without a
    triplet (it has one class only, or each class once) has loss 0.

    Args:
        mining: ``hard``: for each anchor its farthest positive and nearest negative (Hermans et al. 2017);
            ``semihard``: all whose negative is farther than the positive, by less than the margin.
        margin: by how much a negative must be farther than a positive.
    """

    def __init__(self, mining: Literal["hard", "semihard"] = "hard", margin: float = 0.2) -> None:
        super().__init__()
        # Here, since importing it takes a second that runs without this loss should not wait for.
        from pytorch_metric_learning import losses, miners

        semihard = miners.TripletMarginMiner(margin=margin, type_of_triplets="semihard")
        self._mine = semihard if mining == "semihard" else miners.BatchHardMiner()
        self._loss = losses.TripletMarginLoss(margin=margin)

    def forward(self, embedded: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss of embeddings ``float [N, D]`` with labels ``int64 [N]``."""
        embedded = embedded.float()
        return cast(torch.Tensor, self._loss(embedded, labels, self._mine(embedded, labels)))
