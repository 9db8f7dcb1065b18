"""The verbs that make a student: distill, prune, qat."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgefg.cli.app import Except, Only, command, needs, say
from edgefg.cli.export import Target
from edgefg.cli.workstation import PRUNE_DEFAULTS, Out
from edgefg.settings.distillation import DistillationConfig
from edgefg.settings.hardware import Hardware
from edgefg.settings.options import with_options
from edgefg.settings.pruning import PruningConfig
from edgefg.settings.quantization import QuantizationConfig
from edgefg.settings.training import Schedule, TrainingConfig

_DEFAULTS = TrainingConfig()
_DISTILLATION = DistillationConfig()
_HERE = Hardware()
_PRUNING = PruningConfig()
_INT8 = QuantizationConfig()
_QAT_DEFAULTS = TrainingConfig(schedule=Schedule(epochs=3, lr=3e-5))


@command
def distill(
    teacher: Path,
    data: Path,
    out: Out,
    student: str = "tf_efficientnet_lite0",
    weights: str = "hub",
    image_size: int | None = None,
    also: Annotated[list[Path], typer.Option()] = [],  # noqa: B006 (as above)
    extra: Path | None = None,
    teacher_cache: Path | None = None,
    distillation: DistillationConfig = _DISTILLATION,
    config: Annotated[TrainingConfig, Only("schedule", "augmentation", "fine_tuning")] = _DEFAULTS,
    hardware: Hardware = _HERE,
    skip_corrupt: bool = False,
    restart: bool = False,
) -> None:
    """Distil a teacher, or several, into a smaller student. Writes OUT/student.safetensors.

    Args:
        teacher: the teacher's checkpoint.
        data: the data it was trained on.
        out: folder for the checkpoint and the logs.
        student: backbone, any timm or torchvision name.
        weights: hub, none, the path of a state dict or of an edgefg checkpoint, or an installed weight package.
        image_size: network input of the student in pixels; the teacher's where left out.
        also: a further teacher's checkpoint, of the same data; may be repeated. The mean of all is learned.
        extra: folder of images without labels, at any depth, that join the training images.
        teacher_cache: file that keeps the teachers' logits for runs with the same training crops (equal seed, batch
            size, workers and sizes). It is created where it does not exist.
        distillation: what the student learns, an option each.
        config: the training settings, an option each.
        hardware: where to run, an option each.
        skip_corrupt: leave unreadable images out instead of stopping.
        restart: begin anew where an unfinished run lies in OUT.
    """
    try:
        from edgefg.export.distill.distill import distill as run
        from edgefg.training.checkpoint import read_header
    except ImportError as exc:
        raise needs("export", exc) from exc
    path = run(
        teacher,
        data,
        out,
        with_options(config, image_size=image_size or read_header(teacher).input.height),
        student=student,
        weights=weights,
        distillation=distillation,
        also=also,
        extra=extra,
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
    out: Out,
    teacher: Path | None = None,
    pruning: PruningConfig = _PRUNING,
    config: Annotated[TrainingConfig, Only("schedule", "augmentation")] = PRUNE_DEFAULTS,
    hardware: Hardware = _HERE,
    skip_corrupt: bool = False,
    restart: bool = False,
) -> None:
    """Remove whole channels from a student and fine-tune it. Writes OUT/pruned.safetensors.

    A run that was cut off resumes, with the channels that it chose, when the same command is given again.

    Args:
        student: the student's checkpoint.
        data: the data it was trained on.
        out: folder for the checkpoint and the logs.
        teacher: fine-tune on this checkpoint's predictions; on the labels where left out.
        pruning: which channels are removed and how many, an option each.
        config: the training settings, an option each.
        hardware: where to run, an option each.
        skip_corrupt: leave unreadable images out instead of stopping.
        restart: begin anew where an unfinished run lies in OUT.
    """
    try:
        from edgefg.export.prune.prune import prune as run
    except ImportError as exc:
        raise needs("export", exc) from exc
    path = run(
        student,
        data,
        out,
        config,
        pruning,
        teacher_path=teacher,
        hardware=hardware,
        skip_corrupt=skip_corrupt,
        restart=restart,
        progress=say,
    )
    print(path)


@command
def qat(
    student: Path,
    data: Path,
    to: Annotated[Target, typer.Option()],
    out: Out,
    teacher: Path | None = None,
    quantization: Annotated[QuantizationConfig, Except("bias_correction", "max_int8_drop", "keep_layers")] = _INT8,
    config: Annotated[TrainingConfig, Only("schedule", "augmentation")] = _QAT_DEFAULTS,
    hardware: Hardware = _HERE,
    skip_corrupt: bool = False,
    restart: bool = False,
) -> None:
    """Train a student on as the INT8 graph that a target will run. Writes OUT/qat.safetensors.

    Export that with --precision int8 and the same --to; it is not calibrated again.

    Args:
        student: the checkpoint of a student, a pruned student, or a teacher of a single pass.
        data: the data it was trained on.
        to: openvino (IR), onnx (for ONNX Runtime) or tensorrt-onnx, whose quantiser says where the graph rounds.
        out: folder for the checkpoint and the logs.
        teacher: learn this checkpoint's predictions; where left out those of the student itself, in FP32.
        quantization: how the ranges of activations are found, which training keeps, an option each.
        config: the training settings, an option each.
        hardware: where to run, an option each.
        skip_corrupt: leave unreadable images out instead of stopping.
        restart: begin anew where an unfinished run lies in OUT.
    """
    try:
        from edgefg.export.qat.qat import qat as run
    except ImportError as exc:
        raise needs("export", exc) from exc
    path = run(
        student,
        data,
        out,
        config,
        to=to.value,
        teacher_path=teacher,
        quantization=quantization,
        hardware=hardware,
        skip_corrupt=skip_corrupt,
        restart=restart,
    )
    print(path)
