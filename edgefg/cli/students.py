"""The verbs that make a student: distill, prune, qat."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgefg.cli.app import Count, Only, checked, command, needs, say
from edgefg.cli.export import Calibrator, Target
from edgefg.cli.workstation import PRUNE_DEFAULTS, Out
from edgefg.settings.training import Hardware, Pruning, Recipe, Transfer

_DEFAULTS = Recipe(epochs=10, image_size=224)
_TRANSFER = Transfer()
_HERE = Hardware()
_PRUNING = Pruning()
# What a stage that learns from a teacher takes of the recipe.
_PRUNE = (
    "epochs",
    "batch_size",
    "lr",
    "weight_decay",
    "warmup",
    "ema",
    "mix",
    "mix_share",
    "flip",
    "val_every",
    "seed",
)
_QAT = ("epochs", "batch_size", "lr", "weight_decay", "warmup", "min_area", "color", "flip", "val_every", "seed")
_QAT_DEFAULTS = Recipe(epochs=3, image_size=224, lr=3e-5)
_DISTILL = (
    *_PRUNE,
    "train_size",
    "start_size",
    "min_area",
    "color",
    "hue",
    "randaugment",
    "crop_epochs",
    "layer_decay",
)


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
    answers: Path | None = None,
    transfer: Transfer = _TRANSFER,
    recipe: Annotated[Recipe, Only(*_DISTILL)] = _DEFAULTS,
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
        answers: file that keeps what the teachers say, for further runs on the very same crops (seed, batch size,
            workers and sizes); begun where it is not there yet.
        transfer: what the student learns, an option each.
        recipe: the training settings, an option each.
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
        checked(recipe, image_size=image_size or read_header(teacher).input.height),
        student=student,
        weights=weights,
        transfer=transfer,
        also=also,
        extra=extra,
        answers=answers,
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
    pruning: Pruning = _PRUNING,
    recipe: Annotated[Recipe, Only(*_PRUNE)] = PRUNE_DEFAULTS,
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
        recipe: the training settings, an option each.
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
        recipe,
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
    images: Count = 300,
    calibrator: Calibrator = Calibrator.minmax,
    any_cpu: bool | None = None,
    recipe: Annotated[Recipe, Only(*_QAT)] = _QAT_DEFAULTS,
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
        images: how many training images find the ranges of activations, balanced by class.
        calibrator: how those ranges are found: minmax, percentile (0.001 % clipped on each side), mse, or entropy; see
            export. They stay as they are in training.
        any_cpu: 7-bit weights, for x86 CPUs without VNNI, which saturate with 8; where left out, if this CPU is
            such a one.
        recipe: the training settings, an option each.
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
        recipe,
        to=to.value,
        teacher_path=teacher,
        images=images,
        calibrator=calibrator.value,
        any_cpu=any_cpu,
        hardware=hardware,
        skip_corrupt=skip_corrupt,
        restart=restart,
        progress=say,
    )
    print(path)
