"""Classification losses of a batch."""

from __future__ import annotations

import torch
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
