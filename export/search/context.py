"""The context of a search: its inputs, its settings, its folder, and what follows from them for each candidate."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
from msgspec.structs import replace

from edgefg.artifact.manifest import Accuracy
from edgefg.data import ImageDataset
from edgefg.errors import EdgefgError, HardwareError, one_line
from edgefg.export.search.candidates import Architecture, Stage, Variant
from edgefg.export.targets import target_of
from edgefg.export.targets.target import Target
from edgefg.log import get_logger
from edgefg.preprocess import InputSpec
from edgefg.settings.gate import Gate
from edgefg.settings.hardware import Hardware
from edgefg.settings.options import with_options
from edgefg.settings.pruning import PruningConfig
from edgefg.settings.quantization import TargetName
from edgefg.settings.search import CandidateConfig, SearchConfig
from edgefg.settings.training import TrainingConfig

_log = get_logger(__name__)
_SIZE_MULTIPLE = 16
# The default of `edgefg qat`.
_QAT_RATE = 3e-5
# Bytes. More than one artifact: what a failed export wrote is deleted before the free space is looked at.
_MIN_FREE = 2**28


class SearchContext(msgspec.Struct, frozen=True, eq=False, kw_only=True):
    """The inputs, settings and folder of a search, and the candidates that it skipped."""

    teacher: Path
    """Checkpoint of the teacher."""
    teacher_accuracy: Accuracy
    data: ImageDataset
    input: InputSpec
    """The teacher's. Candidates have the same crop rule."""
    out: Path
    to: TargetName
    device: str | None
    """Device of the inference engine."""
    machine: str
    """Describes the machine that measures latencies."""
    search: SearchConfig
    candidates: CandidateConfig
    gate: Gate
    hardware: Hardware
    skipped: list[str] = []

    @property
    def target(self) -> Target:
        """The deployment target."""
        return target_of(self.to)

    @property
    def teacher_cache(self) -> Path | None:
        """File of the teacher's logits, which all candidates share.

        None if images are mixed, because mixed images do not recur.
        """
        return self.out / "teacher-cache.bin" if self.candidates.training.augmentation.mix == "none" else None

    def folder(self, architecture: Architecture, stage: Stage) -> Path:
        """Return the folder of an architecture at a stage."""
        return self.out / stage / architecture.name

    def model(self, variant: Variant, stage: Stage) -> Path:
        """Return the path of a candidate's model file."""
        architecture, precision = variant
        return self.folder(architecture, stage) / precision / self.target.model_name

    def record(self, variant: Variant, stage: Stage) -> Path:
        """Return the path of a candidate's measurements."""
        architecture, precision = variant
        return self.folder(architecture, stage) / f"{precision}.json"

    def input_of(self, architecture: Architecture) -> InputSpec:
        """Return the input of an architecture."""
        return replace(self.input, height=architecture.size, width=architecture.size)

    def training_of(self, architecture: Architecture, stage: Stage) -> TrainingConfig:
        """Return the settings of a distillation."""
        schedule, config = self.search.schedule, self.candidates.training
        multiples = round(schedule.train_share * architecture.size / _SIZE_MULTIPLE)
        train_size = max(1, multiples) * _SIZE_MULTIPLE
        start = config.augmentation.start_size
        start = start if stage == "full" and start < train_size else 0
        epochs = config.schedule.epochs if stage == "full" else schedule.short_epochs
        return with_options(
            config,
            epochs=epochs,
            image_size=architecture.size,
            train_size=train_size,
            start_size=start,
            val_every=epochs,
        )

    def qat_training_of(self, architecture: Architecture) -> TrainingConfig:
        """Return the settings of quantisation-aware training: a low rate, plain crops, and no average of weights."""
        epochs = max(1, self.search.schedule.qat_epochs)
        return with_options(
            self.training_of(architecture, "full"),
            epochs=epochs,
            start_size=0,
            lr=_QAT_RATE,
            randaugment=0,
            hue=0.0,
            mix="none",
            ema=0.0,
            val_every=epochs,
            freeze_epochs=0,
        )

    def pruning_training_of(self, architecture: Architecture, stage: Stage) -> TrainingConfig:
        """Return the settings of the fine-tuning after pruning: half the rate, and fewer epochs for short trials."""
        schedule, full = self.search.schedule, self.candidates.training.schedule
        share = 1.0 if stage == "full" else schedule.short_epochs / full.epochs
        epochs = max(1, round(schedule.prune_epochs * share))
        return with_options(
            self.training_of(architecture, stage),
            epochs=epochs,
            start_size=0,
            lr=full.lr / 2,
            val_every=epochs,
            freeze_epochs=0,
        )

    def pruning_of(self, architecture: Architecture) -> PruningConfig:
        """Return the settings of pruning to an architecture's share of MACs."""
        # With the default limit per layer, about half of the operations is the most that can be removed.
        limit = min(0.95, max(PruningConfig().max_ratio, 1.05 - architecture.macs))
        return replace(self.candidates.pruning, macs=architecture.macs, max_ratio=limit)

    def skip(self, name: str, error: EdgefgError) -> None:
        """Record and log that a candidate is skipped.

        Raises:
            EdgefgError: the error itself, if all candidates would fail alike: missing hardware, or a full disk.
        """
        full = shutil.disk_usage(self.out).free < _MIN_FREE
        if full or isinstance(error, HardwareError) or isinstance(error.__cause__, OSError):
            raise error
        line = f"{name}: {one_line(error)}"
        self.skipped.append(line)
        _log.warning("skipped: %s", line)
