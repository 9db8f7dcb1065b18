"""Verbs that make a student from a teacher: distill, prune, qat, compress."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from edgefg.cli.app import Without, command, needs, print_json
from edgefg.cli.options import (
    Count,
    Device,
    Flag,
    Json,
    Natural,
    Out,
    Restart,
    SkipCorrupt,
    Target,
    Weights,
)
from edgefg.errors import DataError
from edgefg.log import get_logger
from edgefg.settings.distillation import DistillationConfig
from edgefg.settings.gate import Gate
from edgefg.settings.hardware import Hardware
from edgefg.settings.pruning import PruningConfig
from edgefg.settings.quantization import QuantizationConfig
from edgefg.settings.training import Augmentation, FineTuning, Schedule, TrainingConfig

if TYPE_CHECKING:
    from edgefg.export.search.candidates import Front, Student

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
    config = TrainingConfig(image_size=size, schedule=schedule, augmentation=augmentation, fine_tuning=fine_tuning)
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
    to: Target,
    out: Out,
    teacher: Path | None = None,
    quantization: Annotated[
        QuantizationConfig, Without("bias_correction", "max_int8_drop", "keep_layers")
    ] = QuantizationConfig(),
    schedule: Schedule = Schedule(epochs=3, lr=3e-5),
    augmentation: Augmentation = Augmentation(),
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
    max_drop: Annotated[float, Parameter(validator=Number(gte=-100, lte=100))] = 1.0,
    student: tuple[str, ...] = ("tf_efficientnet_lite0",),
    size: tuple[int, ...] = (),
    macs: tuple[float, ...] = (1.0, 0.7),
    precision: tuple[Literal["int8", "fp32"], ...] = ("int8", "fp32"),
    trials: Count = 8,
    finalists: Count = 2,
    short_epochs: Count = 3,
    prune_epochs: Count = 8,
    qat_epochs: Natural = 0,
    train_share: Annotated[float, Parameter(validator=Number(gte=0.1, lte=1))] = 0.85,
    quantization: Annotated[QuantizationConfig, Without("keep_layers")] = QuantizationConfig(),
    generated_golden: Flag = False,
    device: Device = None,
    measure_again: Flag = False,
    gate: Gate = Gate(max_drop=100),
    pruning: Annotated[
        PruningConfig,
        Without("params", "latency", "latency_precision", "max_ratio", "rounds", "round_epochs"),
    ] = PruningConfig(),
    distillation: DistillationConfig = DistillationConfig(),
    schedule: Annotated[Schedule, Without("val_every", "patience")] = Schedule(epochs=30),
    augmentation: Annotated[Augmentation, Without("train_size")] = _LONG_AND_MILD,
    hardware: Hardware = Hardware(),
    skip_corrupt: SkipCorrupt = False,
    json: Json = False,
) -> None:
    """Search for the best student of a teacher within a latency budget.

    Writes OUT/front.json and the chosen artifact, OUT/chosen. The exit status is 1 if no candidate meets the budget.
    Every architecture × size × pruning × precision is measured untrained on this machine. Those within the budget are
    distilled briefly if they are more than --finalists, and the best are trained in full. The same command resumes an
    interrupted search; another budget reuses its results. Candidates are chosen and reported on validation images, so
    evaluate the chosen one on test images, once.

    Args:
        teacher: The teacher's checkpoint.
        data: The data set that it was trained on, with validation images.
        to: The target: OpenVINO IR, or ONNX for ONNX Runtime.
        budget: Largest median latency of a prediction on this machine, for instance 3ms.
        max_drop: Largest loss of top-1 against the teacher on val, in percentage points.
        student: An architecture to try, NAME or NAME=WEIGHTS (see `edgefg train`); may be repeated.
        size: An image size to try, in pixels; may be repeated. Default: the teacher's and three smaller ones.
        macs: A share of the multiply-accumulates to keep by pruning, 1 for none; may be repeated.
        precision: A precision to try; may be repeated.
        trials: Largest number of networks to distil. The slowest within the budget come first.
        finalists: Largest number of networks to train in full, those of earlier runs included.
        short_epochs: Epochs of the brief distillation.
        prune_epochs: Epochs of fine-tuning after a finalist was pruned.
        qat_epochs: Epochs of quantisation-aware training of INT8 finalists. The better of it and plain calibration is
            kept. 0: calibration only.
        train_share: Side of the training crops, as a share of the image size.
        generated_golden: Use generated frames in golden sets, so that artifacts contain no photograph.
        measure_again: Measure all latencies again, for instance if the machine was busy. Latencies of another machine
            are always measured again.
    """
    with needs("export"):
        from edgefg.export.search import candidates, search
        from edgefg.export.search.context import Training
        from edgefg.training.checkpoint import read_header
    students, sizes = [_student(text) for text in student], size or _smaller(read_header(teacher).input.height)
    space = candidates.space_of(students=students, sizes=sizes, macs=macs, precisions=precision)
    training = Training(
        config=TrainingConfig(schedule=schedule, augmentation=augmentation),
        short_epochs=short_epochs,
        prune_epochs=prune_epochs,
        train_share=train_share,
        qat_epochs=qat_epochs,
        distillation=distillation,
        pruning=pruning,
        quantization=quantization,
        generated_golden=generated_golden,
    )
    request = search.Request(
        target=to,
        budget_ms=candidates.parse_budget(budget),
        max_drop=max_drop,
        space=space,
        training=training,
        trials=trials,
        finalists=finalists,
        device=device,
        gate=gate,
        machine=_machine(to),
        measure_again=measure_again,
    )
    front, verified = search.compress(
        teacher, data, out, request, hardware=hardware, skip_corrupt=skip_corrupt, say=_log.info
    )
    _draw(front, out)
    if json:
        print_json(front)
    else:
        print(candidates.render(front))
        if verified is not None:
            print(f"\nchosen: {front.chosen}\n{verified.render()}")
    if front.chosen is None:
        sys.exit(1)


def _student(text: str) -> Student:
    from edgefg.export.search.candidates import Student

    name, _, weights = text.partition("=")
    if not name:
        raise DataError(f"--student {text!r} does not name an architecture. Give NAME or NAME=WEIGHTS")
    return Student(backbone=name, weights=weights or "hub")


def _machine(to: str) -> str:
    """Describe what latencies depend on: processor, cores, engine."""
    from edgefg.benchmarks.device import describe

    here = describe()
    engine = "onnxruntime" if to == "onnx" else to
    return f"{here.cpu}, {here.cores} cores, {engine} {here.versions.get(engine)}"


def _smaller(size: int) -> list[int]:
    """Return a size and three smaller ones, multiples of 16 from 32, largest first."""
    return list(dict.fromkeys(max(32, round(size * share / 16) * 16) for share in (1, 6 / 7, 5 / 7, 4 / 7)))


def _draw(front: Front, out: Path) -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        _log.warning("no plot: matplotlib is not installed. Install it with pip install 'edgefg[report]'")
        return
    from edgefg.evaluation.pareto_plot import Point, draw_front

    points = [
        Point(
            name=candidate.name,
            latency_ms=candidate.latency_ms,
            latency=(candidate.latency_low_ms, candidate.latency_high_ms),
            top1=candidate.accuracy.top1,
            top1_interval=(candidate.accuracy.top1_low, candidate.accuracy.top1_high),
            full=candidate.stage == "full",
            on_front=candidate.name in front.pareto,
            chosen=candidate.name == front.chosen,
        )
        for candidate in front.candidates
        if candidate.accuracy is not None
    ]
    draw_front(
        points, front.budget_ms, front.teacher.top1, front.teacher.top1 - front.max_drop / 100, out / "front.png"
    )
