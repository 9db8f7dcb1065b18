"""Settings of the search for the best student within a latency budget."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from edgefg.settings.distillation import DistillationConfig
from edgefg.settings.export import ExportConfig
from edgefg.settings.pruning import PruningConfig
from edgefg.settings.quantization import QuantizationConfig
from edgefg.settings.training import TrainingConfig


class TrialSchedule(msgspec.Struct, frozen=True, kw_only=True):
    """How long candidates are trained, and on which crops."""

    short_epochs: Annotated[
        int, Meta(ge=1, description="Epochs of the short distillation that selects the finalists.")
    ] = 3
    prune_epochs: Annotated[int, Meta(ge=1, description="Epochs of fine-tuning after a finalist was pruned.")] = 8
    qat_epochs: Annotated[
        int,
        Meta(
            ge=0,
            description="Epochs of quantisation-aware training of INT8 finalists. The better of it and plain"
            " calibration is kept. 0: calibration only.",
        ),
    ] = 0
    train_share: Annotated[
        float, Meta(ge=0.1, le=1, description="Side of the training crops, as a share of the image size.")
    ] = 0.85


class SearchConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The search space, and how many of its candidates are trained.

    Two searches in one folder may differ in all of it but ``schedule``.
    """

    max_drop: Annotated[
        float,
        Meta(
            ge=-100,
            le=100,
            description="Largest loss of top-1 against the teacher on validation images, in percentage points.",
        ),
    ] = 1.0
    students: Annotated[
        tuple[str, ...],
        Meta(
            description="A backbone to try, NAME or NAME=WEIGHTS (see `edgefg train`); may be repeated.",
            extra={"option": "student"},
        ),
    ] = ("tf_efficientnet_lite0",)
    sizes: Annotated[
        tuple[Annotated[int, Meta(ge=16, le=4096)], ...],
        Meta(
            description="An image size to try, in pixels; may be repeated. Default: the teacher's and three smaller"
            " ones.",
            extra={"option": "size"},
        ),
    ] = ()
    macs: Annotated[
        tuple[Annotated[float, Meta(gt=0, le=1)], ...],
        Meta(description="A share of the multiply-accumulates to keep by pruning, 1 for no pruning; may be repeated."),
    ] = (1.0, 0.7)
    precisions: Annotated[
        tuple[Literal["int8", "fp32"], ...],
        Meta(description="A precision to try; may be repeated.", extra={"option": "precision"}),
    ] = ("int8", "fp32")
    trials: Annotated[
        int,
        Meta(ge=1, description="Largest number of architectures to distil. The slowest within the budget come first."),
    ] = 8
    finalists: Annotated[
        int,
        Meta(
            ge=1,
            description="Largest number of architectures to train in full. What earlier searches in the folder trained"
            " in full may be chosen too.",
        ),
    ] = 2
    measure_again: Annotated[
        bool,
        Meta(
            description="Measure all latencies again, for instance if the machine was busy. Latencies of another"
            " machine are always measured again."
        ),
    ] = False
    schedule: TrialSchedule = TrialSchedule()


class CandidateConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How candidates are trained and exported. All searches in one folder have the same."""

    training: TrainingConfig = TrainingConfig()
    """Full distillation. Each candidate has its own image size and training size."""
    distillation: DistillationConfig = DistillationConfig()
    pruning: PruningConfig = PruningConfig()
    """Which channels are removed. Each candidate has its own share of MACs to keep."""
    quantization: QuantizationConfig = QuantizationConfig()
    """``max_int8_drop`` holds for finalists only."""
    export: ExportConfig = ExportConfig()
