"""Where a search works, with what, and how its candidates are trained."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
from msgspec.structs import replace

from edgefg.artifact.manifest import Accuracy
from edgefg.data import ImageDataset
from edgefg.errors import EdgefgError, HardwareError
from edgefg.export.search.candidates import Precision, Shape, Stage, Target
from edgefg.preprocess import InputSpec
from edgefg.settings.distillation import DistillationConfig
from edgefg.settings.gate import Gate
from edgefg.settings.hardware import Hardware
from edgefg.settings.options import with_options
from edgefg.settings.pruning import PruningConfig
from edgefg.settings.quantization import QuantizationConfig
from edgefg.settings.training import TrainingConfig

_MULTIPLE = 16
# As `edgefg qat` has it.
_QAT_RATE = 3e-5
_LEAST_SIZE = 16
# Bytes; more than one artifact, whose remains are gone when a failure is looked at.
_LEAST_SPACE = 2**28


class Training(msgspec.Struct, frozen=True, kw_only=True):
    """How candidates are trained and exported."""

    config: TrainingConfig
    """Of the full distillation; its image and training sizes are each candidate's own."""
    short_epochs: int
    """Of the distillation that finds the finalists."""
    prune_epochs: int
    """Of the fine-tuning of a pruned finalist; of the others as many in proportion."""
    train_share: float
    """Side of the training crops, as a share of the image size."""
    quantization: QuantizationConfig = QuantizationConfig()
    """``max_int8_drop`` is for finalists only."""
    qat_epochs: int = 0
    """Of quantisation-aware training of INT8 finalists, beside calibration; 0: they are calibrated alone."""
    distillation: DistillationConfig = DistillationConfig()
    pruning: PruningConfig = PruningConfig()
    """How candidates are pruned; how far is each one's own."""
    generated_golden: bool = False

    def of(self, size: int, stage: Stage) -> TrainingConfig:
        """Return the config of a distillation at an image size."""
        train_size = max(_LEAST_SIZE, round(self.train_share * size / _MULTIPLE) * _MULTIPLE)
        start = self.config.augmentation.start_size
        start = start if stage == "full" and start < train_size else 0
        epochs = self.config.schedule.epochs if stage == "full" else self.short_epochs
        return with_options(
            self.config, epochs=epochs, image_size=size, train_size=train_size, start_size=start, val_every=epochs
        )

    def in_int8(self, size: int) -> TrainingConfig:
        """Return the config of quantisation-aware training: short, at a small rate, on plain crops, no average."""
        config = self.of(size, "full")
        epochs = max(1, self.qat_epochs)
        return with_options(
            config, epochs=epochs, start_size=0, lr=_QAT_RATE, randaugment=0, hue=0.0, mix="none", ema=0.0,
            val_every=epochs, freeze_epochs=0,
        )  # fmt: skip

    def after_pruning(self, size: int, stage: Stage) -> TrainingConfig:
        """Return the config of the fine-tuning after pruning, at half the rate."""
        share = 1.0 if stage == "full" else self.short_epochs / self.config.schedule.epochs
        epochs = max(1, round(self.prune_epochs * share))
        return with_options(
            self.of(size, stage),
            epochs=epochs,
            start_size=0,
            lr=self.config.schedule.lr / 2,
            val_every=epochs,
            freeze_epochs=0,
        )


class Site(msgspec.Struct, frozen=True, eq=False, kw_only=True):
    """Where a search works, and with what."""

    teacher: Path
    """A checkpoint."""
    teacher_accuracy: Accuracy
    data: ImageDataset
    input: InputSpec
    """The teacher's; candidates have its crop rule."""
    out: Path
    target: Target
    training: Training
    device: str | None
    """The engine's."""
    hardware: Hardware
    gate: Gate
    """How much worse than its own FP32 network a candidate may be."""
    machine: str
    """Where latencies are measured."""
    say: Callable[[str], None]

    @property
    def teacher_cache(self) -> Path | None:
        """File of what the teacher said, which all candidates share; None where images are mixed."""
        return self.out / "teacher-cache.bin" if self.training.config.augmentation.mix == "none" else None

    def spec(self, shape: Shape) -> InputSpec:
        """Return what a candidate takes."""
        return replace(self.input, height=shape.size, width=shape.size)

    def stop_if_at_fault(self, failure: EdgefgError) -> None:
        """Raise a failure that is not a candidate's own: missing hardware or a full disk fails all of them alike."""
        full = shutil.disk_usage(self.out).free < _LEAST_SPACE
        if full or isinstance(failure, HardwareError) or isinstance(failure.__cause__, OSError):
            raise failure

    def record(self, shape: Shape, precision: Precision, stage: Stage) -> Path:
        """Return where a finished candidate is written down."""
        return self.out / stage / shape.name / f"{precision}.json"
