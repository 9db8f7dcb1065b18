"""The loss of a student: its distance from the predictions and feature maps of its teachers for the same crops.

"Patient and consistent" (Beyer et al. 2022): teachers see the crops that the student sees, loaded at the larger of
their sizes. Their logits may be cached by crop (`edgefg.export.distill.teacher_cache`), but not by image.
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
from edgefg.training.data.mix import create_mixer, evaluating
from edgefg.training.ensemble import load_compatible
from edgefg.training.losses import cross_entropy
from edgefg.training.models import backbone as backbones
from edgefg.training.models.ensemble import Ensemble, resized
from edgefg.training.models.network import Batch, Network, mean_logits
from edgefg.training.objective import Objective


class Teacher(NamedTuple):
    """A frozen network to learn from."""

    network: nn.Module
    header: Header
    sha256: str
    """Of the checkpoint."""

    def view(self, images: torch.Tensor, size: int = 0) -> torch.Tensor:
        """Resize crops, ``uint8`` or float levels ``[N, H, W, 3]``, to ``size`` (0: the teacher's image size)."""
        return resized(images, size or self.header.input.height, size or self.header.input.width)


def load_teachers(paths: Sequence[Path]) -> list[Teacher]:
    """Load teachers and freeze them. Raises as `edgefg.training.ensemble.load_compatible`."""
    return [Teacher(network.requires_grad_(False), header, sha) for network, header, sha in load_compatible(paths)]


def open_teacher_cache(path: Path, teachers: Sequence[Teacher], distillation: DistillationConfig) -> TeacherCache:
    """Open the cache of these teachers' logits. Raises `DataError` as `TeacherCache`."""
    # The logits of one teacher are cached as they are. Only a mean of several depends on the temperature.
    temperature = distillation.temperature if len(teachers) > 1 else 1.0
    identity = [teacher.sha256 for teacher in teachers] + [f"{distillation.teacher_size} px", f"T={temperature:g}"]
    return TeacherCache(path, ", ".join(identity), len(teachers[0].header.labels))


class DistillationObjective(Objective):
    """``(1 − hard)·loss(student, teachers) + hard·CE(labels) + w_f·features + w_a·attention``.

    `DistillationConfig` has the weights. The target of ``loss`` is the mean of the teachers' softmaxes at the
    temperature. Feature and attention maps are compared with those of each teacher.

    DKD needs one class per image. It is the label, or the teachers' top class if there is no label or the image is
    mixed: the labels of mixed images are areas, whereas the teachers know what can be seen.

    An image without label (`UNLABELLED`) has no cross entropy, nor has an image that was mixed with one.

    The convolutions that map the student's features to the teachers' channels are parameters of this module. They are
    trained together with the student. The run's state holds them; the student's checkpoint does not.

    Args:
        teachers: the teachers.
        student: the network to train.
        config: label smoothing, mixing and sizes are used.
        distillation: what to learn.
        cache: cache of the teachers' logits. It cannot be used with mixing, or where maps are compared.

    Raises:
        DataError: a cache is given together with mixing or maps.
        TrainingError: see `create_mixer`.
        WeightsError: maps are compared, and a backbone has none.
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        student: nn.Module,
        config: TrainingConfig,
        distillation: DistillationConfig | None = None,
        cache: TeacherCache | None = None,
    ) -> None:
        super().__init__()
        # torch does not register the modules of a tuple: teachers are not part of the run's state.
        self._teachers = tuple(teachers)
        self._settings = distillation or DistillationConfig()
        self._criterion = cross_entropy(config.schedule.label_smoothing)
        self._mix = create_mixer(config.augmentation, student, len(teachers[0].header.labels))
        self._cache = cache
        self._size = config.size_at(0)
        self._adapters = nn.ModuleList()
        if cache is not None and (self._mix is not None or self._settings.needs_maps):
            raise DataError(
                "--teacher-cache cannot be used with mixed images or feature maps. Remove it, or --mix,"
                " --feature-weight and --attention-weight"
            )
        if self._settings.needs_maps:
            # Also for attention maps, which need no adapter: a backbone without maps is refused here.
            width, *wide = (_channels(network) for network in (student, *(teacher.network for teacher in teachers)))
            if self._settings.feature_weight:
                self._adapters.extend(nn.Conv2d(width, channels, 1) for channels in wide)

    def crop_size(self, size: int) -> int:
        """Begin an epoch whose training crops have ``size`` pixels; return the size in which to load them."""
        self._size = size
        own = [max(teacher.header.input.height, teacher.header.input.width) for teacher in self._teachers]
        return max(size, self._settings.teacher_size or max(own))

    def forward(self, network: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss and the student's logits of a batch."""
        known = batch.labels != UNLABELLED
        # The mixer needs a class for every image. Those of unlabelled images are not used.
        batch = batch._replace(labels=batch.labels.clamp_min(0))
        if self._mix is not None:
            batch = self._mix(network, batch)
        mixed = batch.targets is not None
        if mixed:
            known = known & known.roll(1)  # each image is mixed with the one before it
        logits, maps = self._run(network, resized(batch.images, self._size, self._size))
        if self._cache is None:
            wanted, teacher_maps = self._run_teachers(batch.images)
        else:
            wanted, teacher_maps = self._cache(batch.images, lambda missing: self._run_teachers(missing)[0]), []
        target = wanted.argmax(dim=1) if mixed else torch.where(known, batch.labels, wanted.argmax(dim=1))
        # In float32: in half precision, the logarithm of a softmax loses the small probabilities.
        hard = self._settings.hard_share
        loss = (1 - hard) * self._prediction_loss(logits.float(), wanted, target)
        if hard:
            loss = loss + hard * self._label_loss(logits, batch, known)
        if maps is not None:
            loss = loss + self._map_loss(maps.float(), teacher_maps)
        return loss, logits

    @torch.no_grad()
    def _run_teachers(self, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the teachers' mean logits and, if maps are compared, the maps of each."""
        size = self._settings.teacher_size
        outputs = [self._run(teacher.network, teacher.view(images, size)) for teacher in self._teachers]
        wanted = _mean_of([logits for logits, _ in outputs], self._settings.temperature)
        return wanted, [found.float() for _, found in outputs if found is not None]

    def _run(self, network: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the logits and, if maps are compared, the last feature maps."""
        if self._settings.needs_maps:
            # Any: the network may be wrapped by Fabric.
            both: tuple[torch.Tensor, torch.Tensor] = cast(Any, network).logits_and_maps(images)
            return both
        return network(images), None

    def _prediction_loss(self, logits: torch.Tensor, wanted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        temperature = self._settings.temperature
        if self._settings.loss == "dkd":
            return losses.dkd(logits, wanted, target, temperature, beta=self._settings.beta)
        return (losses.dist if self._settings.loss == "dist" else losses.kl_divergence)(logits, wanted, temperature)

    def _label_loss(self, logits: torch.Tensor, batch: Batch, known: torch.Tensor) -> torch.Tensor:
        """Return the cross entropy of the images with labels. Each has the same weight in every batch."""
        if known.all():
            return self._criterion(logits, batch)
        if not known.any():
            return logits.new_zeros(())
        targets = None if batch.targets is None else batch.targets[known]
        labelled = batch._replace(labels=batch.labels[known], targets=targets)
        return self._criterion(logits[known], labelled) * known.float().mean()

    def _map_loss(self, maps: torch.Tensor, teacher_maps: Sequence[torch.Tensor]) -> torch.Tensor:
        total = maps.new_zeros(())
        if self._settings.feature_weight:
            distances = [
                losses.feature_distance(adapter(maps), found)
                for adapter, found in zip(self._adapters, teacher_maps, strict=True)
            ]
            total = total + self._settings.feature_weight * torch.stack(distances).mean()
        if self._settings.attention_weight:
            distances = [losses.attention_distance(maps, found) for found in teacher_maps]
            total = total + self._settings.attention_weight * torch.stack(distances).mean()
        return total


def _mean_of(logits: Sequence[torch.Tensor], temperature: float) -> torch.Tensor:
    """Return ``float32`` logits whose softmax at a temperature is the mean of those of ``logits``."""
    if len(logits) == 1:
        return logits[0].float()
    return mean_logits([one.float() / temperature for one in logits]) * temperature


@torch.no_grad()
def _channels(network: nn.Module) -> int:
    """Return the number of channels of a network's last feature maps."""
    if isinstance(network, Ensemble):
        raise WeightsError(
            "--feature-weight and --attention-weight compare feature maps, which an ensemble does not have. Use one of"
            " its members as the teacher"
        )
    backbone = cast(Network, network).backbone
    try:
        with evaluating(backbone):  # an empty image must not change the statistics of the norms
            return backbones.maps(backbone, backbones.example_planes(backbone)).shape[1]
    except WeightsError as exc:
        raise WeightsError(f"--feature-weight and --attention-weight compare feature maps, and {exc}") from exc
