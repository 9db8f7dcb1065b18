"""Verbs that make a student from a teacher: distill, prune, qat, compress."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from edgefg.cli.app import Without, command, needs, print_json
from edgefg.cli.options import DeviceOption, Json, Out, Restart, SkipCorrupt, TargetOption, Weights
from edgefg.log import get_logger
from edgefg.settings.distillation import DistillationConfig
from edgefg.settings.export import ExportConfig
from edgefg.settings.gate import Gate
from edgefg.settings.hardware import Hardware
from edgefg.settings.options import with_options
from edgefg.settings.pruning import PruningConfig
from edgefg.settings.quantization import QuantizationConfig
from edgefg.settings.search import CandidateConfig, SearchConfig
from edgefg.settings.training import Augmentation, FineTuning, Schedule, TrainingConfig

_log = get_logger(__name__)
# A student that imitates a teacher bears long training on small crops (Beyer et al. 2022).
_LONG_AND_MILD = Augmentation(min_area=0.2, randaugment=9, color=0.0)


@command
def distill(
    teacher: Path,
    data: Path,
    /,
    *,
    out: Out,
    student: str = "tf_efficientnet_lite0",
    weights: Weights = "hub",
    image_size: Annotated[int | None, Parameter(validator=Number(gte=16))] = None,
    extra_teacher: tuple[Path, ...] = (),
    unlabelled: Path | None = None,
    teacher_cache: Path | None = None,
    distillation: DistillationConfig = DistillationConfig(),
    schedule: Schedule = Schedule(),
    augmentation: Augmentation = Augmentation(),
    fine_tuning: FineTuning = FineTuning(),
    hardware: Hardware = Hardware(),
    skip_corrupt: SkipCorrupt = False,
    restart: Restart = False,
) -> None:
    """Distil one or more teachers into a smaller student.

    Writes OUT/student.safetensors and logs. The same command resumes an interrupted run.

    Args:
        teacher: The teacher's checkpoint.
        data: The data set that it was trained on.
        student: The student's backbone, a timm or torchvision model.
        image_size: Height and width of the student's input in pixels. Default: the teacher's.
        extra_teacher: Checkpoint of another teacher of the same data; may be repeated. The student
            learns from their mean.
        unlabelled: Folder of images without labels that are added to the training images.
        teacher_cache: File that caches the teachers' logits. Later runs with the same crops (seed, batch size, workers
            and sizes) read it.
    """
    with needs("export"):
        from edgefg.export.distill.distill import distill as run
        from edgefg.training.checkpoint import read_header
    size = image_size or read_header(teacher).input.height
    groups = TrainingConfig(schedule=schedule, augmentation=augmentation, fine_tuning=fine_tuning)
    config = with_options(groups, image_size=size)
    path = run(
        teacher,
        data,
        out,
        config,
        student=student,
        weights=weights,
        distillation=distillation,
        extra_teachers=extra_teacher,
        unlabelled=unlabelled,
        teacher_cache=teacher_cache,
        hardware=hardware,
        skip_corrupt=skip_corrupt,
        restart=restart,
    )
    print(path)


@command
def prune(
    student: Path,
    data: Path,
    /,
    *,
    out: Out,
    teacher: Path | None = None,
    pruning: PruningConfig = PruningConfig(),
    schedule: Schedule = Schedule(epochs=5, lr=5e-4),
    augmentation: Augmentation = Augmentation(),
    hardware: Hardware = Hardware(),
    skip_corrupt: SkipCorrupt = False,
    restart: Restart = False,
) -> None:
    """Prune channels of a student and fine-tune it.

    Writes OUT/pruned.safetensors and logs. The same command resumes an interrupted run with the channels that it chose.

    Args:
        student: The student's checkpoint.
        data: The data set that it was trained on.
        teacher: Fine-tune on the predictions of this checkpoint. Default: on the labels.
    """
    with needs("export"):
        from edgefg.export.prune.prune import prune as run
    path = run(
        student,
        data,
        out,
        TrainingConfig(schedule=schedule, augmentation=augmentation),
        pruning,
        teacher_path=teacher,
        hardware=hardware,
        skip_corrupt=skip_corrupt,
        restart=restart,
    )
    print(path)


@command
def qat(
    student: Path,
    data: Path,
    /,
    *,
    to: TargetOption,
    out: Out,
    teacher: Path | None = None,
    quantization: Annotated[
        QuantizationConfig, Without("bias_correction", "max_int8_drop", "keep_layers")
    ] = QuantizationConfig(),
    schedule: Annotated[Schedule, Without("ema", "patience")] = Schedule(epochs=3, lr=3e-5),
    augmentation: Annotated[
        Augmentation, Without("mix", "mix_alpha", "mix_share", "train_size", "start_size", "crop_epochs")
    ] = Augmentation(),
    hardware: Hardware = Hardware(),
    skip_corrupt: SkipCorrupt = False,
    restart: Restart = False,
) -> None:
    """Fine-tune a student with quantisation-aware training.

    The student is trained as the INT8 graph of a target. Calibration sets the ranges of its activations, which stay
    fixed. Writes OUT/qat.safetensors and logs. Export it with --precision int8 and the same --to.

    Args:
        student: Checkpoint of a student, a pruned student, or a teacher of a single pass.
        data: The data set that it was trained on.
        teacher: Learn from the predictions of this checkpoint. Default: those of the student in FP32.
    """
    with needs("export"):
        from edgefg.export.qat.qat import qat as run
    path = run(
        student,
        data,
        out,
        TrainingConfig(schedule=schedule, augmentation=augmentation),
        to=to,
        teacher_path=teacher,
        quantization=quantization,
        hardware=hardware,
        skip_corrupt=skip_corrupt,
        restart=restart,
    )
    print(path)


@command
def compress(
    teacher: Path,
    data: Path,
    /,
    *,
    to: Literal["openvino", "onnx"],
    budget: str,
    out: Out,
    search: SearchConfig = SearchConfig(),
    quantization: Annotated[QuantizationConfig, Without("keep_layers")] = QuantizationConfig(),
    export: Annotated[ExportConfig, Without("batch", "seed", "fit_temperature")] = ExportConfig(),
    device: DeviceOption = None,
    gate: Annotated[Gate, Without("max_drop")] = Gate(max_drop=100),
    pruning: Annotated[
        PruningConfig,
        Without("macs", "params", "latency", "latency_precision", "max_ratio", "rounds", "round_epochs"),
    ] = PruningConfig(),
    distillation: DistillationConfig = DistillationConfig(),
    schedule: Annotated[Schedule, Without("val_every", "patience")] = Schedule(epochs=30),
    augmentation: Annotated[Augmentation, Without("train_size")] = _LONG_AND_MILD,
    hardware: Annotated[Hardware, Without("precision")] = Hardware(),
    skip_corrupt: SkipCorrupt = False,
    json: Json = False,
) -> None:
    """Search for the best student of a teacher within a latency budget.

    Writes OUT/front.json, OUT/front.png and the chosen artifact, OUT/chosen. The exit status is 1 if no candidate is
    feasible. Every backbone × image size × pruning × precision is measured untrained on this machine. Those within the
    budget are distilled briefly if they are more than --finalists, and the best are trained in full. The same command
    resumes an interrupted search; another budget reuses its results. Candidates are chosen and reported on validation
    images, so evaluate the chosen one on test images, once.

    Args:
        teacher: The teacher's checkpoint.
        data: The data set that it was trained on, with validation images.
        to: The target: OpenVINO IR, or ONNX for ONNX Runtime.
        budget: Largest median latency of a prediction on this machine, for instance 3ms.
    """
    with needs("export"):
        from edgefg.export.search import candidates
        from edgefg.export.search.plot import plot_front
        from edgefg.export.search.search import compress as run
    front, verified = run(
        teacher,
        data,
        out,
        to=to,
        budget_ms=candidates.parse_budget(budget),
        search=search,
        candidates=CandidateConfig(
            training=TrainingConfig(schedule=schedule, augmentation=augmentation),
            distillation=distillation,
            pruning=pruning,
            quantization=quantization,
            export=export,
        ),
        gate=gate,
        device=device,
        hardware=hardware,
        skip_corrupt=skip_corrupt,
    )
    plot_front(front, out / "front.png")
    if json:
        print_json(front)
    else:
        print(candidates.render(front))
        if verified is not None:
            print(f"\nchosen: {front.chosen}\n{verified.render()}")
    if front.chosen is None:
        sys.exit(1)
