"""Verbs that train teachers, and the one that runs every stage: methods, train, ensemble, pipeline."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from edgefg.cli.app import Without, command, needs, print_json
from edgefg.cli.options import Count, GroupPattern, Json, Out, Restart, SkipCorrupt, SplitSeed, Weights
from edgefg.errors import DataError
from edgefg.log import get_logger
from edgefg.settings.gate import Gate
from edgefg.settings.hardware import Hardware
from edgefg.settings.options import with_options
from edgefg.settings.split import SplitSpec
from edgefg.settings.training import Augmentation, Schedule, TrainingConfig

if TYPE_CHECKING:
    from edgefg.export.pipeline import PipelineResult

_log = get_logger(__name__)


@command
def methods(*, method: str | None = None, json: Json = False) -> None:
    """List the training methods and their options.

    The defaults are those of the papers.

    Args:
        method: List only this one.
    """
    with needs("train"):
        from edgefg.training.methods import METHODS, describe, method_options
    if method is not None:
        method_options(method, {})
    described = [describe(name) for name in METHODS if method in (None, name)]
    if json:
        print_json({entry.name: entry for entry in described})
        return
    for entry in described:
        print(entry.render())


@command
def train(
    data: Path,
    /,
    *,
    out: Out,
    backbone: str = "tf_efficientnet_lite0",
    method: str = "plain",
    option: Annotated[tuple[str, ...], Parameter(name=["--option", "-o"])] = (),
    weights: Weights = "hub",
    training: TrainingConfig = TrainingConfig(),
    split_seed: SplitSeed = 0,
    group: GroupPattern = None,
    hardware: Hardware = Hardware(),
    skip_corrupt: SkipCorrupt = False,
    restart: Restart = False,
) -> None:
    """Train a teacher: fine-tune a backbone on labelled images.

    Writes OUT/teacher.safetensors, a CSV log and a TensorBoard log. The same command resumes an interrupted run.

    Args:
        data: The data set; see `edgefg data`. DATA/<class>/*.jpg is split 70/15/15.
        backbone: Name of a timm or torchvision model. torchvision:NAME asks for torchvision's.
        method: Training method; see `edgefg methods`.
        option: An option of the method as NAME=VALUE; may be repeated.
    """
    with needs("train"):
        from edgefg.training.teacher import train_teacher
    path = train_teacher(
        data,
        out,
        training,
        backbone=backbone,
        method=method,
        options=_pairs(option),
        weights=weights,
        split=SplitSpec(seed=split_seed, group=group),
        hardware=hardware,
        skip_corrupt=skip_corrupt,
        restart=restart,
    )
    print(path)


@command
def ensemble(
    checkpoints: list[Path], /, *, out: Out, average: Literal["predictions", "weights"] = "predictions"
) -> None:
    """Combine trained checkpoints into one.

    Writes OUT/teacher.safetensors. Averaged weights keep the kind of their checkpoints, for instance
    OUT/student.safetensors.

    Args:
        checkpoints: Two or more checkpoints of the same classes and data.
        average: predictions is the mean of the probabilities of any networks. weights is one network with the mean of
            the weights (model soup), for networks of one architecture that started from the same weights.
    """
    with needs("train"):
        from edgefg.training.ensemble import combine
    print(combine(checkpoints, out, average))


@command
def pipeline(
    data: Path,
    /,
    *,
    out: Out,
    backbone: str = "tf_efficientnet_lite2",
    weights: Weights = "hub",
    student: str = "tf_efficientnet_lite0",
    student_weights: str = "hub",
    image_size: int = 224,
    student_epochs: Count = 10,
    prune_epochs: Count = 5,
    macs: float = 0.7,
    schedule: Schedule = Schedule(),
    augmentation: Augmentation = Augmentation(),
    gate: Gate = Gate(),
    split_seed: SplitSeed = 0,
    group: GroupPattern = None,
    hardware: Annotated[Hardware, Without("devices")] = Hardware(),
    skip_corrupt: SkipCorrupt = False,
    restart: Restart = False,
    json: Json = False,
) -> None:
    """Run every stage, from training to verified artifacts.

    Trains, distils, prunes, exports to every target, verifies, and compares the results on the test split. Stages that
    are already complete in OUT are kept. Prints a table and writes OUT/summary.json.

    Args:
        data: The data set; see `edgefg data`.
        backbone: The teacher's backbone.
        student: The student's backbone.
        student_weights: The student's pretrained weights.
        image_size: Height and width of the input of both networks in pixels.
        student_epochs: Epochs of the distillation.
        prune_epochs: Epochs of fine-tuning after pruning, at half the learning rate.
        macs: Share of the multiply-accumulates that pruning keeps.
    """
    with needs("export"):
        from edgefg.export import pipeline as stages
    config = TrainingConfig(image_size=image_size, schedule=schedule, augmentation=augmentation)
    plan = stages.Plan(
        data=str(data.resolve()),
        backbone=backbone,
        weights=weights,
        student=student,
        student_weights=student_weights,
        teacher_config=config,
        student_config=with_options(config, epochs=student_epochs),
        prune_config=with_options(config, epochs=prune_epochs, lr=schedule.lr / 2),
        macs=macs,
        split=SplitSpec(seed=split_seed, group=group),
    )
    result = stages.run(plan, out, hardware=hardware, gate=gate, skip_corrupt=skip_corrupt, restart=restart)
    _summarise(result, out, json)


def _summarise(result: PipelineResult, out: Path, json: bool) -> None:
    """Measure the results side by side on one split, and print where they are."""
    from edgefg.benchmarks import summary

    _log.info("measuring on %s", result.split)
    figures = summary.summarize(result.table, result.data, result.split, skip_corrupt=True)
    summary.write(figures, out / "summary.json")
    if json:
        print_json(figures)
        return
    print(f"\n{summary.render(figures)}\n")
    for artifact, report in result.reports:
        print(f"{artifact.folder}: {report.render()}")
    print(f"\nThe results are in {out}, the figures in {out / 'summary.json'}. To classify an image:\n")
    print(f"  {Path(sys.argv[0])} predict {result.table[-1][1]} {result.image}")


def _pairs(options: Sequence[str]) -> dict[str, str]:
    """Parse NAME=VALUE."""
    for option in options:
        if "=" not in option:
            raise DataError(f"--option {option!r} is not NAME=VALUE, for instance maps=32")
    return {name: value for name, _, value in (option.partition("=") for option in options)}
