"""The verbs that make a teacher, or everything: train, methods, ensemble, pipeline."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgefg.cli.app import Count, Except, Only, command, needs, print_json, say
from edgefg.errors import DataError
from edgefg.settings.gate import Gate
from edgefg.settings.hardware import Hardware
from edgefg.settings.options import with_options
from edgefg.settings.split import SplitSpec
from edgefg.settings.training import Schedule, TrainingConfig

if TYPE_CHECKING:
    from edgefg.export.pipeline import PipelineResult

Out = Annotated[Path, typer.Option()]
Options = Annotated[list[str], typer.Option("--option", "-o")]
_DEFAULTS = TrainingConfig()
PRUNE_DEFAULTS = TrainingConfig(schedule=Schedule(epochs=5, lr=5e-4))
_HERE = Hardware()
_GATE = Gate()


class Average(str, Enum):
    """What `ensemble` averages."""

    predictions = "predictions"
    weights = "weights"


@command
def train(
    data: Path,
    out: Out,
    backbone: str = "tf_efficientnet_lite0",
    method: str = "plain",
    option: Options = [],  # noqa: B006 (Typer needs a list; it is never changed)
    weights: str = "hub",
    config: Annotated[TrainingConfig, Except("crop_epochs")] = _DEFAULTS,
    split_seed: int = 0,
    group: str | None = None,
    hardware: Hardware = _HERE,
    skip_corrupt: bool = False,
    restart: bool = False,
) -> None:
    """Train a teacher: fine-tune a backbone on labelled images. Writes OUT/teacher.safetensors.

    A run that was cut off resumes when the same command is given again.

    Args:
        data: DATA/{train,val,test}/<class>/*.jpg, or DATA/<class>/*.jpg, which is split 70/15/15; or what else
            `edgefg data` reads.
        out: folder for the checkpoint, the CSV and the TensorBoard log.
        backbone: any timm or torchvision name (torchvision:NAME asks for torchvision's).
        method: how the teacher is made; `edgefg methods` lists them.
        option: one of the method's options, as NAME=VALUE; may be repeated.
        weights: hub (timm's download), none, the path of a state dict or of an edgefg checkpoint, or an installed
            weight package.
        split_seed: seed of the split of data without split folders.
        group: regular expression; images whose paths match alike (camera, patient, lot) stay in one split.
        config: the training settings, an option each.
        hardware: where to run, an option each.
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
        config,
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
def methods(method: str | None = None, json: bool = False) -> None:
    """List the methods that a teacher can be made with, each with its options and the paper's defaults.

    Args:
        method: only this one.
        json: print them as one JSON object.
    """
    try:
        from edgefg.training.methods import METHODS, describe, method_options
    except ImportError as exc:
        raise needs("train", exc) from exc
    if method is not None:
        method_options(method, {})
    described = [describe(name) for name in METHODS if method in (None, name)]
    if json:
        print_json({entry.name: entry for entry in described})
        return
    for entry in described:
        print(entry.render())


@command
def ensemble(checkpoints: list[Path], out: Out, average: Average = Average.predictions) -> None:
    """Put several trained checkpoints together. Writes OUT/teacher.safetensors; of weights, the kind's own name.

    Args:
        checkpoints: at least two, of the same classes and data.
        out: folder for the checkpoint.
        average: predictions: the mean of their probabilities, for any networks; weights: one network of their mean
            weights, for networks of one make that began alike.
    """
    try:
        from edgefg.training.ensemble import combine
    except ImportError as exc:
        raise needs("train", exc) from exc
    print(combine(checkpoints, out, average.value))


@command
def pipeline(
    data: Path,
    out: Out,
    backbone: str = "tf_efficientnet_lite2",
    weights: str = "hub",
    student: str = "tf_efficientnet_lite0",
    student_weights: str = "hub",
    config: Annotated[TrainingConfig, Only("image_size", "epochs", "batch_size", "seed")] = _DEFAULTS,
    student_epochs: Count = 10,
    prune_epochs: Count = 5,
    macs: float = 0.7,
    gate: Gate = _GATE,
    split_seed: int = 0,
    group: str | None = None,
    hardware: Annotated[Hardware, Only("accelerator", "precision", "workers")] = _HERE,
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
        student_epochs: the student's epochs.
        prune_epochs: epochs of fine-tuning after pruning.
        macs: share of the multiply-accumulates that pruning keeps.
        gate: how much worse than its parent an artifact may be on val, an option each.
        split_seed: seed of the split of data without split folders.
        group: regular expression; images whose paths match alike stay in one split.
        config: the training settings, an option each.
        hardware: where to run, an option each.
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
        teacher_config=config,
        student_config=with_options(config, epochs=student_epochs),
        prune_config=with_options(config, epochs=prune_epochs, lr=PRUNE_DEFAULTS.schedule.lr),
        macs=macs,
        split=SplitSpec(seed=split_seed, group=group),
    )
    result = stages.run(plan, out, hardware=hardware, gate=gate, skip_corrupt=skip_corrupt, restart=restart, say=say)
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
    print(f"\nEverything lies in {out}; the figures are in {out / 'summary.json'}. Classify one more image:\n")
    print(f"  {Path(sys.argv[0])} predict {result.table[-1][1]} {result.image}")


def _pairs(options: Sequence[str]) -> dict[str, str]:
    """Take NAME=VALUE apart."""
    for option in options:
        if "=" not in option:
            raise DataError(f"--option {option!r} is not NAME=VALUE, for instance maps=32")
    return {name: value for name, _, value in (option.partition("=") for option in options)}
