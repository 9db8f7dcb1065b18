"""An ensemble: the mean of the probabilities of several classifiers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple, cast

import torch
from torch import nn
from torch.nn import functional as F

from edgefg.errors import WeightsError
from edgefg.preprocess import InputSpec
from edgefg.training.models.network import Attention, Batch, Criterion, Network, NoOptions, Step, mean_logits


class Member(NamedTuple):
    """One classifier of an ensemble."""

    network: Network
    input: InputSpec
    """Its input. Only the size is used."""


def resized(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize images, ``uint8`` or float levels ``[N, H, W, 3]``. Resized images are float levels."""
    if tuple(images.shape[1:3]) == (height, width):
        return images
    planes = images.permute(0, 3, 1, 2).float()
    return F.interpolate(planes, (height, width), mode="bilinear", antialias=True).permute(0, 2, 3, 1)


class Ensemble(Network):
    """Runs every member at its own image size; softmax of ``forward`` is the mean of the members' softmaxes.

    It expects images of the largest member's size. Images of another size are resized for each member in proportion:
    for crops of four fifths of the size, every member gets four fifths of its own.

    It combines trained networks (`edgefg.training.ensemble`) and is not trained itself. Distil it into a student.

    Args:
        members: at least two, of the same classes in the same order.
    """

    summary: ClassVar[str] = "mean of the probabilities of several teachers"
    single_pass: ClassVar[bool] = False

    def __init__(self, members: Sequence[Member]) -> None:
        nn.Module.__init__(self)  # Network.__init__ expects one backbone
        self.options = NoOptions()
        self.members = nn.ModuleList(member.network for member in members)
        # Height and width of each member, relative to the largest one.
        height, width = max((member.input.height, member.input.width) for member in members)
        self._shares = tuple((member.input.height / height, member.input.width / width) for member in members)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits, ``float32 [N, classes]``, whose softmax is the mean over the members."""
        return mean_logits([network(view) for network, view in self._views(images)])

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Return the concatenated embeddings of the members, ``float32 [N, ΣD]``."""
        return torch.cat([network.features(view) for network, view in self._views(images)], dim=1)

    def attention(self, images: torch.Tensor) -> Attention:
        """Return where the first member looks."""
        network, view = self._views(images)[0]
        return network.attention(view)

    def logits_and_maps(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Raise `WeightsError`: an ensemble has no feature maps."""
        raise WeightsError("an ensemble has no feature maps. Compare only its predictions, or use one of its members")

    def loss(self, batch: Batch, criterion: Criterion) -> Step:
        """Raise `WeightsError`: an ensemble is not trained."""
        raise WeightsError("an ensemble cannot be trained. Train its members, and combine them with `edgefg ensemble`")

    def new_modules(self) -> Sequence[nn.Module]:
        """Return no modules: all members are trained."""
        return []

    def _views(self, images: torch.Tensor) -> list[tuple[Network, torch.Tensor]]:
        height, width = images.shape[1:3]
        return [
            (cast(Network, network), resized(images, round(height * tall), round(width * wide)))
            for network, (tall, wide) in zip(self.members, self._shares, strict=True)
        ]
