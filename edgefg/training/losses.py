"""Classification loss, and metric losses on embeddings."""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import nn
from torch.nn import functional as F

from edgefg.training.models.network import Batch, Criterion


def cross_entropy(label_smoothing: float) -> Criterion:
    """Create the cross entropy with the labels of a batch or, if it was mixed, its soft targets. Mean over the batch.

    Args:
        label_smoothing: ε of (1-ε)·target + ε/classes (Szegedy et al. 2016, section 7).
    """

    def criterion(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        target = batch.labels if batch.targets is None else batch.targets
        # In float32: half precision loses small probabilities.
        return F.cross_entropy(logits.float(), target, label_smoothing=label_smoothing)

    return criterion


class CenterLoss(nn.Module):
    """Center loss (Wen et al. 2016): ½‖x − c_y‖², mean over the batch (equation 2, which sums).

    In training, centres are updated by the paper's rule after the loss is computed: c_j −= α·Δc_j with
    Δc_j = Σ 1(y_i = j)·(c_j − x_i) / (1 + Σ 1(y_i = j)) (equation 4). They have no gradient. They start at zero, are
    part of the run's state, and differ between the processes of a distributed run.

    Args:
        classes: number of centres.
        width: D, their length.
        alpha: α, the update rate of the centres.
    """

    centres: torch.Tensor

    def __init__(self, classes: int, width: int, alpha: float = 0.5) -> None:
        super().__init__()
        self._alpha = alpha
        # A buffer, not a parameter: it is updated by the rule above, not by the optimiser.
        self.register_buffer("centres", torch.zeros(classes, width))

    def forward(self, embedded: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss of embeddings ``float [N, D]`` with labels ``int64 [N]``, and update the centres."""
        apart = embedded.float() - self.centres[labels]
        if self.training:
            self._move(apart.detach(), labels)
        return 0.5 * apart.square().sum(dim=1).mean()

    @torch.no_grad()
    def _move(self, apart: torch.Tensor, labels: torch.Tensor) -> None:
        counts = torch.bincount(labels, minlength=len(self.centres))
        # index_add_ sums over the images of a class; assignment by index would keep only one of them.
        self.centres.index_add_(0, labels, self._alpha * apart / (1 + counts[labels, None]))


class TripletLoss(nn.Module):
    """Triplet loss (Schroff et al. 2015), max(0, d(a, p) − d(a, n) + margin), mean over the triplets above zero.

    d is the distance of normalised embeddings. Loss and mining are pytorch-metric-learning's. A batch without triplets
    (one class only, or each class once) has loss 0.

    Args:
        mining: ``hard``: the farthest positive and the nearest negative of each anchor (Hermans et al. 2017).
            ``semihard``: all triplets whose negative is farther away than the positive, but within the margin.
        margin: distance by which negatives must be farther away than positives.
    """

    def __init__(self, mining: Literal["hard", "semihard"] = "hard", margin: float = 0.2) -> None:
        super().__init__()
        # Imported here: it takes a second, which runs without this loss need not wait for.
        from pytorch_metric_learning import losses, miners

        semihard = miners.TripletMarginMiner(margin=margin, type_of_triplets="semihard")
        self._mine = semihard if mining == "semihard" else miners.BatchHardMiner()
        self._loss = losses.TripletMarginLoss(margin=margin)

    def forward(self, embedded: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss of embeddings ``float [N, D]`` with labels ``int64 [N]``."""
        embedded = embedded.float()
        return cast(torch.Tensor, self._loss(embedded, labels, self._mine(embedded, labels)))
