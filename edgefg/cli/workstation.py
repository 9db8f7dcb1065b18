"""The verbs that make an artifact: train, distill, prune, export, pipeline."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import msgspec
import typer

from edgefg.cli.app import Count, command, needs, print_json, say
from edgefg.errors import DataError
from edgefg.sources import image_files

if TYPE_CHECKING:
    from edgefg.export.pipeline import PipelineResult
    from edgefg.split import SplitSpec
    from edgefg.training.recipe import Hardware, Recipe

_Settings = TypeVar("_Settings", bound=msgspec.Struct)
Batch = Annotated[int, typer.Option(min=2)]
Side = Annotated[int, typer.Option(min=16, max=4096)]
Out = Annotated[Path, typer.Option()]


class Target(str, Enum):
    """What `export` emits."""

    openvino = "openvino"
    onnx = "onnx"
    tensorrt_onnx = "tensorrt-onnx"


class Precision(str, Enum):
    """Arithmetic of the emitted network."""

    fp32 = "fp32"
    int8 = "int8"


@command
def train(
    data: Path,
    out: Out,
    backbone: str = "tf_efficientnet_lite0",
    method: str = "plain",
    weights: str = "hub",
    image_size: Side = 224,
    epochs: Count = 10,
    batch_size: Batch = 32,
    lr: float = 1e-3,
    seed: int = 0,
    split_seed: int = 0,
    group: str | None = None,
    accelerator: str = "auto",
    devices: Count = 1,
    precision: str = "auto",
    workers: int = 1,
    skip_corrupt: bool = False,
    restart: bool = False,
) -> None:
    """Train a teacher: fine-tune a backbone on a folder of images. Writes OUT/teacher.safetensors.

    A run that was cut off resumes when the same command is given again.

    Args:
        data: DATA/{train,val,test}/<class>/*.jpg, or DATA/<class>/*.jpg, which is split 70/15/15.
        out: folder for the checkpoint, the CSV and the TensorBoard log.
        backbone: any timm or torchvision name (torchvision:NAME asks for torchvision's).
        method: how the teacher is made.
        weights: hub (timm's download), none, the path of a state dict, or an installed weight package.
        image_size: height and width of the network input in pixels.
        epochs: passes over the training images.
        batch_size: images in a step.
        lr: peak learning rate of AdamW.
        seed: seed of the head, the order and the augmentation.
        split_seed: seed of the split of data without split folders.
        group: regular expression; images whose paths match alike (camera, patient, lot) stay in one split.
        accelerator: Lightning Fabric's accelerator, auto, cpu, cuda or mps.
        devices: how many of them.
        precision: auto, or Lightning Fabric's name, for instance bf16-mixed.
        workers: processes that decode images.
        skip_corrupt: leave unreadable images out instead of stopping.
        restart: begin anew where an unfinished run lies in OUT.
    """
    try:
        from edgefg.training.teacher import train_teacher
    except ImportError as exc:
        raise needs("train", exc) from exc
    path = train_teacher(
        data,
        out,
        _recipe(epochs, image_size, batch_size, lr, seed),
        backbone=backbone,
        method=method,
        weights=weights,
        split=_split(split_seed, group),
        hardware=_hardware(accelerator, devices, precision, workers),
        skip_corrupt=skip_corrupt,
        restart=restart,
    )
    print(path)


@command
def distill(
    teacher: Path,
    data: Path,
    out: Out,
    student: str = "tf_efficientnet_lite0",
    weights: str = "hub",
    image_size: int | None = None,
    epochs: Count = 10,
    batch_size: Batch = 32,
    lr: float = 1e-3,
    temperature: float = 1.0,
    hard_weight: float = 0.0,
    seed: int = 0,
    accelerator: str = "auto",
    devices: Count = 1,
    precision: str = "auto",
    workers: int = 1,
    skip_corrupt: bool = False,
    restart: bool = False,
) -> None:
    """Distil a teacher into a smaller student. Writes OUT/student.safetensors.

    Args:
        teacher: the teacher's checkpoint.
        data: the data it was trained on.
        out: folder for the checkpoint and the logs.
        student: backbone, any timm or torchvision name.
        weights: hub, none, the path of a state dict, or an installed weight package.
        image_size: network input of the student in pixels; the teacher's where left out.
        epochs: passes over the training images.
        batch_size: images in a step.
        lr: peak learning rate of AdamW.
        temperature: softens both predictions.
        hard_weight: share of the loss that is cross entropy to the labels.
        seed: seed of the head, the order and the augmentation.
        accelerator: Lightning Fabric's accelerator, auto, cpu, cuda or mps.
        devices: how many of them.
        precision: auto, or Lightning Fabric's name, for instance bf16-mixed.
        workers: processes that decode images.
        skip_corrupt: leave unreadable images out instead of stopping.
        restart: begin anew where an unfinished run lies in OUT.
    """
    try:
        from edgefg.export.distill import distill as run
        from edgefg.training.checkpoint import read_header
    except ImportError as exc:
        raise needs("export", exc) from exc
    path = run(
        teacher,
        data,
        out,
        _recipe(epochs, image_size or read_header(teacher).input.height, batch_size, lr, seed),
        student=student,
        weights=weights,
        temperature=temperature,
        hard_weight=hard_weight,
        hardware=_hardware(accelerator, devices, precision, workers),
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
    macs: float = 0.7,
    round_to: int = 16,
    max_ratio: float = 0.25,
    epochs: Count = 5,
    batch_size: Batch = 32,
    lr: float = 5e-4,
    seed: int = 0,
    accelerator: str = "auto",
    devices: Count = 1,
    precision: str = "auto",
    workers: int = 1,
    skip_corrupt: bool = False,
    restart: bool = False,
) -> None:
    """Remove whole channels from a student and fine-tune it. Writes OUT/pruned.safetensors.

    Args:
        student: the student's checkpoint.
        data: the data it was trained on.
        out: folder for the checkpoint and the logs.
        teacher: fine-tune on this checkpoint's predictions; on the labels where left out.
        macs: share of the multiply-accumulates to keep.
        round_to: channel counts become multiples of this; 16 suits INT8, 8 floating point.
        max_ratio: greatest share of its channels that a layer may lose.
        epochs: passes over the training images.
        batch_size: images in a step.
        lr: peak learning rate of AdamW.
        seed: seed of the order and the augmentation.
        accelerator: Lightning Fabric's accelerator, auto, cpu, cuda or mps.
        devices: how many of them.
        precision: auto, or Lightning Fabric's name, for instance bf16-mixed.
        workers: processes that decode images.
        skip_corrupt: leave unreadable images out instead of stopping.
        restart: begin anew where an unfinished run lies in OUT.
    """
    try:
        from edgefg.export.prune import prune as run
        from edgefg.training.checkpoint import read_header
    except ImportError as exc:
        raise needs("export", exc) from exc
    path = run(
        student,
        data,
        out,
        _recipe(epochs, read_header(student).input.height, batch_size, lr, seed),
        macs=macs,
        round_to=round_to,
        max_ratio=max_ratio,
        teacher_path=teacher,
        hardware=_hardware(accelerator, devices, precision, workers),
        skip_corrupt=skip_corrupt,
        restart=restart,
    )
    print(path)


@command
def export(
    checkpoint: Path,
    to: Annotated[Target, typer.Option()],
    out: Out,
    calibration: Path | None = None,
    precision: Precision = Precision.fp32,
    images: Count = 300,
    batch: int = 1,
    any_cpu: bool = False,
    seed: int = 0,
    skip_corrupt: bool = False,
) -> None:
    """Export a checkpoint as an artifact: model file, manifest and golden set in the folder OUT.

    Args:
        checkpoint: a teacher, student or pruned student.
        to: openvino (IR), onnx (for ONNX Runtime) or tensorrt-onnx (to be built on the device).
        out: folder of the artifact; an earlier artifact there is replaced once the new one is whole.
        calibration: the data set it was trained on; calibration and golden images come from its training split.
        precision: fp32 or int8.
        images: how many images calibrate, balanced by class.
        batch: static batch size; 0 takes any.
        any_cpu: 7-bit weights in int8, for x86 CPUs without VNNI, which saturate with 8.
        seed: seed of the choice of images.
        skip_corrupt: leave unreadable images out instead of stopping.
    """
    try:
        from edgefg.export.export import export_checkpoint
    except ImportError as exc:
        raise needs("export", exc) from exc
    path = export_checkpoint(
        checkpoint,
        out,
        to=to.value,
        precision=precision.value,
        calibration=calibration,
        images=images,
        batch=batch,
        any_cpu=any_cpu,
        seed=seed,
        skip_corrupt=skip_corrupt,
        progress=say,
    )
    print(path)


@command
def pipeline(
    data: Path,
    out: Out,
    backbone: str = "tf_efficientnet_lite2",
    weights: str = "hub",
    student: str = "tf_efficientnet_lite0",
    student_weights: str = "hub",
    image_size: Side = 224,
    epochs: Count = 10,
    student_epochs: Count = 10,
    prune_epochs: Count = 5,
    macs: float = 0.7,
    batch_size: Batch = 32,
    max_drop: float = 1.0,
    seed: int = 0,
    split_seed: int = 0,
    group: str | None = None,
    accelerator: str = "auto",
    precision: str = "auto",
    workers: int = 1,
    skip_corrupt: bool = False,
    restart: bool = False,
    json: bool = False,
) -> None:
    """Run every stage: train, distil, prune, export to every target, verify, and compare on the test split.

    What is there already is kept, so that a run that was cut off goes on. Ends with a table and OUT/summary.json.

    Args:
        data: DATA/{train,val,test}/<class>/*.jpg, or DATA/<class>/*.jpg, which is split 70/15/15.
        out: folder for everything.
        backbone: the teacher's backbone.
        weights: the teacher's starting weights.
        student: the student's backbone.
        student_weights: the student's starting weights.
        image_size: network input in pixels.
        epochs: the teacher's epochs.
        student_epochs: the student's epochs.
        prune_epochs: epochs of fine-tuning after pruning.
        macs: share of the multiply-accumulates that pruning keeps.
        batch_size: images in a step.
        max_drop: greatest loss of top-1 on val that INT8 may cost, in percentage points.
        seed: seed of every stage.
        split_seed: seed of the split of data without split folders.
        group: regular expression; images whose paths match alike stay in one split.
        accelerator: Lightning Fabric's accelerator, auto, cpu, cuda or mps.
        precision: auto, or Lightning Fabric's name, for instance bf16-mixed.
        workers: processes that decode images.
        skip_corrupt: leave unreadable images out instead of stopping.
        restart: redo what an earlier run left in OUT.
        json: print the summary as JSON instead of a table.
    """
    try:
        from edgefg.export import pipeline as stages
    except ImportError as exc:
        raise needs("export", exc) from exc
    plan = stages.Plan(
        data=str(data.resolve()),
        backbone=backbone,
        weights=weights,
        student=student,
        student_weights=student_weights,
        teacher_recipe=_recipe(epochs, image_size, batch_size, 1e-3, seed),
        student_recipe=_recipe(student_epochs, image_size, batch_size, 1e-3, seed),
        prune_recipe=_recipe(prune_epochs, image_size, batch_size, 5e-4, seed),
        macs=macs,
        split=_split(split_seed, group),
    )
    hardware = _hardware(accelerator, 1, precision, workers)
    result = stages.run(
        plan, out, hardware=hardware, max_drop=max_drop, skip_corrupt=skip_corrupt, restart=restart, say=say
    )
    _summarise(result, out, json)


def _summarise(result: PipelineResult, out: Path, json: bool) -> None:
    """Measure what the pipeline made, side by side on one split, and say where everything lies."""
    from edgefg.benchmarks import summary

    say(f"measuring on {result.split}")
    figures = summary.summarize(result.table, result.data, result.split, skip_corrupt=True)
    summary.write(figures, out / "summary.json")
    if json:
        print_json(figures)
        return
    print(f"\n{summary.render(figures)}\n")
    for artifact, report in result.reports:
        print(f"{artifact.folder}: {report.render()}")
    image = image_files(result.data / (result.split if (result.data / result.split).is_dir() else "train"))[0]
    print(f"\nEverything lies in {out}; the figures are in {out / 'summary.json'}. Classify one more image:\n")
    print(f"  {Path(sys.argv[0])} predict {result.table[-1][1]} {image}")


def _recipe(epochs: int, image_size: int, batch_size: int, lr: float, seed: int) -> Recipe:
    from edgefg.training.recipe import Recipe

    return _checked(Recipe, epochs=epochs, image_size=image_size, batch_size=batch_size, lr=lr, seed=seed)


def _hardware(accelerator: str, devices: int, precision: str, workers: int) -> Hardware:
    from edgefg.training.recipe import Hardware

    return _checked(Hardware, accelerator=accelerator, devices=devices, precision=precision, workers=workers)


def _split(seed: int, group: str | None) -> SplitSpec:
    from edgefg.split import SplitSpec

    return SplitSpec(seed=seed, group=group)


def _checked(kind: type[_Settings], **values: object) -> _Settings:
    """Build a settings struct, its constraints checked; a value out of range is the user's mistake."""
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as exc:
        raise DataError(f"an option is out of range: {exc}") from exc
