"""The verb that searches: state the budget, get the engine."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgefg.cli.app import Count, Except, Only, command, needs, print_json, say
from edgefg.cli.workstation import Out
from edgefg.errors import DataError
from edgefg.settings.distillation import DistillationConfig
from edgefg.settings.gate import Gate
from edgefg.settings.hardware import Hardware
from edgefg.settings.pruning import PruningConfig
from edgefg.settings.quantization import QuantizationConfig
from edgefg.settings.training import Augmentation, Schedule, TrainingConfig

if TYPE_CHECKING:
    from edgefg.export.search.candidates import Front, Student

# Long and mild, as a student that has a teacher to follow bears it (Beyer et al. 2022).
_DEFAULTS = TrainingConfig(
    schedule=Schedule(epochs=30), augmentation=Augmentation(min_area=0.2, randaugment=9, color=0.0)
)
_DISTILLATION = DistillationConfig()
_PRUNING = PruningConfig()
_QUANTIZATION = QuantizationConfig()
# The loss of top-1 is counted against the teacher.
_GATE = Gate(max_drop=100)
_HERE = Hardware()
_LIST = typer.Option()


class Target(str, Enum):
    """What `compress` emits and measures here."""

    openvino = "openvino"
    onnx = "onnx"


@command
def compress(
    teacher: Path,
    data: Path,
    to: Annotated[Target, typer.Option()],
    budget: Annotated[str, typer.Option()],
    out: Out,
    max_drop: Annotated[float, typer.Option(min=-100, max=100)] = 1.0,
    student: Annotated[list[str], _LIST] = ["tf_efficientnet_lite0"],  # noqa: B006 (Typer needs a list)
    size: Annotated[list[int], _LIST] = [],  # noqa: B006
    macs: Annotated[list[float], _LIST] = [1.0, 0.7],  # noqa: B006
    precision: Annotated[list[str], _LIST] = ["int8", "fp32"],  # noqa: B006
    trials: Count = 8,
    finalists: Count = 2,
    short_epochs: Count = 3,
    prune_epochs: Count = 8,
    qat_epochs: Annotated[int, typer.Option(min=0)] = 0,
    train_share: Annotated[float, typer.Option(min=0.1, max=1)] = 0.85,
    quantization: Annotated[QuantizationConfig, Except("keep_layers")] = _QUANTIZATION,
    generated_golden: bool = False,
    device: str | None = None,
    measure_again: bool = False,
    gate: Annotated[Gate, Only("max_class_drop", "max_flips", "min_agreement")] = _GATE,
    pruning: Annotated[PruningConfig, Only("importance", "isomorphic", "uniform", "round_to")] = _PRUNING,
    distillation: DistillationConfig = _DISTILLATION,
    config: Annotated[
        TrainingConfig, Only("schedule", "augmentation"), Except("train_size", "val_every", "patience")
    ] = _DEFAULTS,
    hardware: Annotated[Hardware, Only("accelerator", "devices", "workers")] = _HERE,
    skip_corrupt: bool = False,
    json: bool = False,
) -> None:
    """Search for the best student of a teacher within a latency budget. Writes OUT/front.json and OUT/chosen.

    Every architecture × size × pruning × precision is measured untrained on this machine; those inside the budget are
    distilled for a short while, where they are more than --finalists; the best are trained in full. Ends with 1 where
    no candidate fits. The same command goes on where it was cut off; another budget begins with what is there.
    Validation images choose and are reported: evaluate what was chosen on test images, once.

    Args:
        teacher: the teacher's checkpoint.
        data: the data it was trained on, with validation images.
        to: openvino or onnx (ONNX Runtime).
        budget: greatest median latency of a prediction on this machine, for instance 3ms.
        out: folder for everything; the artifact that was chosen is OUT/chosen.
        max_drop: greatest loss of top-1 on val against the teacher, percentage points.
        student: an architecture to try, NAME or NAME=WEIGHTS (hub, none, a state dict, a weight package); may be
            repeated.
        size: an image size to try, pixels; may be repeated. The teacher's and smaller ones where left out.
        macs: a share of the multiply-accumulates to keep by pruning, 1 for none; may be repeated.
        precision: int8 or fp32; may be repeated.
        trials: how many shapes are distilled at most, the slowest inside the budget first.
        finalists: how many of them are trained in full; where there are more, a short distillation of all decides; one
            that an earlier run trained in full takes a place too.
        short_epochs: epochs of the short distillation.
        prune_epochs: epochs of fine-tuning after pruning a finalist.
        qat_epochs: epochs of quantisation-aware training of INT8 finalists, of which the better of both is taken; 0:
            they are calibrated alone.
        train_share: side of the training crops, as a share of the image size.
        quantization: how int8 candidates are made, an option each; --max-int8-drop is for finalists only.
        generated_golden: prove artifacts by generated frames, so that no photograph goes with them.
        device: the engine's device, for instance GPU with OpenVINO.
        measure_again: measure all latencies anew, as where the machine was busy; what another machine measured in this
            folder always is.
        gate: how much worse than its own fp32 network the choice may be on val, an option each.
        pruning: which channels go, an option each.
        distillation: what the students learn, an option each.
        config: the full training's settings, an option each.
        hardware: where to train, an option each.
        skip_corrupt: leave unreadable images out instead of stopping.
        json: print the front as JSON.
    """
    try:
        from edgefg.export.search import candidates, search
        from edgefg.export.search.context import Training
        from edgefg.training.checkpoint import read_header
    except ImportError as exc:
        raise needs("export", exc) from exc
    students, sizes = [_student(text) for text in student], size or _smaller(read_header(teacher).input.height)
    space = candidates.space_of(students=students, sizes=sizes, macs=macs, precisions=precision)
    training = Training(
        config=config,
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
        target=to.value,
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
        teacher, data, out, request, hardware=hardware, skip_corrupt=skip_corrupt, say=say
    )
    _draw(front, out)
    if json:
        print_json(front)
    else:
        print(candidates.render(front))
        if verified is not None:
            print(f"\nchosen: {front.chosen}\n{verified.render()}")
    if front.chosen is None:
        raise typer.Exit(1)


def _student(text: str) -> Student:
    from edgefg.export.search.candidates import Student

    name, _, weights = text.partition("=")
    if not name:
        raise DataError(f"--student {text!r} names no architecture; needed NAME or NAME=WEIGHTS")
    return Student(backbone=name, weights=weights or "hub")


def _machine(to: Target) -> str:
    """Say where latencies are measured: processor, cores, engine."""
    from edgefg.benchmarks.device import describe

    here = describe()
    engine = "onnxruntime" if to is Target.onnx else to.value
    return f"{here.cpu}, {here.cores} cores, {engine} {here.versions.get(engine)}"


def _smaller(size: int) -> list[int]:
    """Return a size and three smaller ones, multiples of 16 from 32, largest first."""
    return list(dict.fromkeys(max(32, round(size * share / 16) * 16) for share in (1, 6 / 7, 5 / 7, 4 / 7)))


def _draw(front: Front, out: Path) -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        say("matplotlib is not installed, so there is no plot: pip install 'edgefg[report]'")
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
