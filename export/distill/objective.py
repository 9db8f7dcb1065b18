"""The loss of a student: what it matches of one or several teachers, on the very same crops, mixed alike.

"Patient and consistent" (Beyer et al. 2022): teachers see the crops that the student sees, made at the larger of their
sizes. What teachers said of one crop may be kept (`edgefg.export.distill.teacher_cache`), never of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from edgefg.data.split import UNLABELLED
from edgefg.errors import DataError, WeightsError
from edgefg.export.distill import losses as losses
from edgefg.export.distill.teacher_cache import TeacherCache
from edgefg.settings.distillation import DistillationConfig
from edgefg.settings.training import TrainingConfig
from edgefg.training.checkpoint import Header
from edgefg.training.data.mix import evaluating, mixer_of
from edgefg.training.ensemble import read_alike
from edgefg.training.losses import cross_entropy
from edgefg.training.models import backbone as parts
from edgefg.training.models.ensemble import Ensemble, resized
from edgefg.training.models.network import Batch, Network, mean_logits


class Teacher(NamedTuple):
    """A frozen network to learn from."""

    network: nn.Module
    header: Header
    sha256: str
    """Of its checkpoint."""

    def view(self, images: torch.Tensor, size: int = 0) -> torch.Tensor:
        """Resize crops, ``[N, H, W, 3]`` of ``uint8`` or float levels, to ``size``, or to its own (0)."""
        return resized(images, size or self.header.input.height, size or self.header.input.width)


def read_teachers(paths: Sequence[Path]) -> list[Teacher]:
    """Load teachers that may be asked together, frozen. Raises as `edgefg.training.ensemble.read_alike`."""
    return [Teacher(network.requires_grad_(False), header, digest) for network, header, digest in read_alike(paths)]


def open_teacher_cache(path: Path, teachers: Sequence[Teacher], distillation: DistillationConfig) -> TeacherCache:
    """Open the file that keeps these teachers' teacher_cache. Raises `DataError` as `TeacherCache`."""
    # What one teacher says is kept as it is; only a mean of several is taken at a temperature.
    temperature = distillation.temperature if len(teachers) > 1 else 1.0
    words = [teacher.sha256 for teacher in teachers] + [f"{distillation.teacher_size} px", f"T={temperature:g}"]
    return TeacherCache(path, ", ".join(words), len(teachers[0].header.labels))


class Distillation(nn.Module):
    """``(1 − hard)·loss(student, teachers) + hard·CE(labels) + w_f·features + w_a·attention``.

    What ``hard`` is by default depends on the loss, see `edgefg.settings.distillation.DistillationConfig.hard_share`.

    The target of ``loss`` is the mean of the teachers' softmaxes at its temperature; that of the maps each teacher's
    own. A teacher of several passes gives what its inference gives. DKD needs one class an image: it is the label where
    there is one, else the teachers' top class. That includes mixed images, whose labels are areas: what there is to be
    seen in them the teachers know better, and two targets at once are none of the paper's.

    An image without label (`UNLABELLED`) has no cross entropy; nor has one that was mixed with such an image.

    The regressors that bring the student's features to the teachers' channels are this module's parameters: they learn
    along and are part of the run's state, never of the student.

    Args:
        teachers: whom to learn from.
        student: the network that will be trained.
        config: its label smoothing, mixing and sizes are used.
        distillation: what to learn.
        teacher_cache: where the teachers' logits are kept from run to run; not with mixing, nor where maps are matched.

    Raises:
        DataError: ``teacher_cache`` with either of these.
        TrainingError: see `mixer_of`.
        WeightsError: maps are to be matched, and a backbone has none.
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        student: nn.Module,
        config: TrainingConfig,
        distillation: DistillationConfig | None = None,
        teacher_cache: TeacherCache | None = None,
    ) -> None:
        super().__init__()
        # In a tuple, which torch does not register: they are no part of the run's state.
        self._teachers = tuple(teachers)
        self._settings = distillation or DistillationConfig()
        self._criterion = cross_entropy(config.schedule.label_smoothing)
        self._mix = mixer_of(config.augmentation, student, len(teachers[0].header.labels))
        self._cache = teacher_cache
        self._size = config.size_at(0)
        self._adapters = nn.ModuleList()
        if teacher_cache is not None and (self._mix is not None or self._settings.needs_maps):
            raise DataError(
                "a teacher cache cannot be used where images are mixed or maps are matched; leave out --teacher-cache"
            )
        if self._settings.needs_maps:
            # Counted for attention too, which needs no regressor: a backbone without maps stops here.
            width, *wide = (_channels(network) for network in (student, *(teacher.network for teacher in teachers)))
            if self._settings.feature_weight:
                self._adapters.extend(nn.Conv2d(width, channels, 1) for channels in wide)

    def crop_size(self, size: int) -> int:
        """Begin an epoch in which the student sees crops of ``size``; return the size that they are to be made at."""
        self._size = size
        own = [max(teacher.header.input.height, teacher.header.input.width) for teacher in self._teachers]
        return max(size, self._settings.teacher_size or max(own))

    def forward(self, student: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss and the student's logits of a batch."""
        known = batch.labels != UNLABELLED
        # The mixer's targets need a class, whichever: those of unlabelled images are not read.
        batch = batch._replace(labels=batch.labels.clamp_min(0))
        if self._mix is not None:
            batch = self._mix(student, batch)
        mixed = batch.targets is not None
        if mixed:
            known = known & known.roll(1)  # each image is mixed with the one before
        logits, maps = self._ask(student, resized(batch.images, self._size, self._size))
        if self._cache is None:
            wanted, theirs = self._consult(batch.images)
        else:
            wanted, theirs = self._cache(batch.images, lambda unknown: self._consult(unknown)[0]), []
        target = wanted.argmax(dim=1) if mixed else torch.where(known, batch.labels, wanted.argmax(dim=1))
        # In float32: the logarithm of a softmax in half precision loses the small probabilities that matter here.
        hard = self._settings.hard_share
        loss = (1 - hard) * self._of_predictions(logits.float(), wanted, target)
        if hard:
            loss = loss + hard * self._of_labels(logits, batch, known)
        if maps is not None:
            loss = loss + self._of_maps(maps.float(), theirs)
        return loss, logits

    @torch.no_grad()
    def _consult(self, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the teachers' mean logits of crops and, where they are matched, each one's maps."""
        size = self._settings.teacher_size
        passes = [self._ask(teacher.network, teacher.view(images, size)) for teacher in self._teachers]
        wanted = _mean_of([answer for answer, _ in passes], self._settings.temperature)
        return wanted, [found.float() for _, found in passes if found is not None]

    def _ask(self, network: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return logits and, where they are matched, last maps."""
        if self._settings.needs_maps:
            # Typed as Any: under Fabric the network is wrapped.
            both: tuple[torch.Tensor, torch.Tensor] = cast(Any, network).logits_and_maps(images)
            return both
        return network(images), None

    def _of_predictions(self, logits: torch.Tensor, wanted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        temperature = self._settings.temperature
        if self._settings.loss == "dkd":
            return losses.dkd(logits, wanted, target, temperature, beta=self._settings.beta)
        return (losses.dist if self._settings.loss == "dist" else losses.kl_divergence)(logits, wanted, temperature)

    def _of_labels(self, logits: torch.Tensor, batch: Batch, known: torch.Tensor) -> torch.Tensor:
        """Return the cross entropy of images with labels, of which each weighs alike in every batch."""
        if known.all():
            return self._criterion(logits, batch)
        if not known.any():
            return logits.new_zeros(())
        targets = None if batch.targets is None else batch.targets[known]
        labelled = batch._replace(labels=batch.labels[known], targets=targets)
        return self._criterion(logits[known], labelled) * known.float().mean()

    def _of_maps(self, ours: torch.Tensor, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        total = ours.new_zeros(())
        if self._settings.feature_weight:
            apart = [
                losses.feature_distance(adapter(ours), found)
                for adapter, found in zip(self._adapters, theirs, strict=True)
            ]
            total = total + self._settings.feature_weight * torch.stack(apart).mean()
        if self._settings.attention_weight:
            apart = [losses.attention_distance(ours, found) for found in theirs]
            total = total + self._settings.attention_weight * torch.stack(apart).mean()
        return total


def _mean_of(passes: Sequence[torch.Tensor], temperature: float) -> torch.Tensor:
    """Return ``float32`` logits whose softmax at a temperature is the mean of those of ``passes``."""
    if len(passes) == 1:
        return passes[0].float()
    return mean_logits([logits.float() / temperature for logits in passes]) * temperature


@torch.no_grad()
def _channels(network: nn.Module) -> int:
    """Return the number of channels of a network's last maps."""
    if isinstance(network, Ensemble):
        raise WeightsError(
            "--feature-weight and --attention-weight match feature maps, and an ensemble has none of its own; give one"
            " of its members as the teacher"
        )
    backbone = cast(Network, network).backbone
    try:
        with evaluating(backbone):  # the norms' statistics must not learn from an empty image
            return parts.maps(backbone, parts.example_planes(backbone)).shape[1]
    except WeightsError as exc:
        raise WeightsError(f"--feature-weight and --attention-weight match feature maps, and {exc}") from exc
