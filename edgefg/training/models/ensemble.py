"""Several classifiers asked together: the mean of their probabilities is the answer."""

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
    """What it was trained for; only the size counts here."""


def resized(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize images, ``[N, H, W, 3]`` of ``uint8`` or float levels, to another size, as float levels."""
    if tuple(images.shape[1:3]) == (height, width):
        return images
    planes = images.permute(0, 3, 1, 2).float()
    return F.interpolate(planes, (height, width), mode="bilinear", antialias=True).permute(0, 2, 3, 1)


class Ensemble(Network):
    """Looks at an image with every member, each at its own size; softmax of ``forward`` is the mean of their softmaxes.

    Images of the largest member's size are what it expects; of others, each member sees the size that stands to its own
    as theirs stands to that: crops for a student, say, at four fifths of everything.

    It is made of trained networks (`edgefg.training.ensemble`) and learns nothing itself: distil it into a student.

    Args:
        members: at least two, of the same classes in the same order.
    """

    summary: ClassVar[str] = "several teachers, whose probabilities are averaged"
    single_pass: ClassVar[bool] = False

    def __init__(self, members: Sequence[Member]) -> None:
        nn.Module.__init__(self)  # Network's own would want one backbone
        self.options = NoOptions()
        self.members = nn.ModuleList(member.network for member in members)
        # Height and width of each, as shares of the largest's.
        height, width = max((member.input.height, member.input.width) for member in members)
        self._shares = tuple((member.input.height / height, member.input.width / width) for member in members)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits, ``float32 [N, classes]``, whose softmax is the mean over the members."""
        return mean_logits([network(view) for network, view in self._views(images)])

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Return the members' embeddings side by side, ``float32 [N, ΣD]``."""
        return torch.cat([network.features(view) for network, view in self._views(images)], dim=1)

    def attention(self, images: torch.Tensor) -> Attention:
        """Return where the first member looks."""
        network, view = self._views(images)[0]
        return network.attention(view)

    def logits_and_maps(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Raise `WeightsError`: the maps of several networks are no one network's."""
        raise WeightsError(
            "an ensemble has no feature maps of its own; match its predictions alone, or one member's maps"
        )

    def loss(self, batch: Batch, criterion: Criterion) -> Step:
        """Raise `WeightsError`: its members are trained one by one."""
        raise WeightsError("an ensemble is not trained; train its members and put them together with `edgefg ensemble`")

    def new_modules(self) -> Sequence[nn.Module]:
        """List nothing: all of it is trained."""
        return []

    def _views(self, images: torch.Tensor) -> list[tuple[Network, torch.Tensor]]:
        height, width = images.shape[1:3]
        return [
            (cast(Network, network), resized(images, round(height * tall), round(width * wide)))
            for network, (tall, wide) in zip(self.members, self._shares, strict=True)
        ]
