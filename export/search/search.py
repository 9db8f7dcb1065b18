"""State the budget, get the engine: the best student that keeps a measured latency and a tolerated loss.

    edgefg compress runs/x/teacher.safetensors DATA --to openvino --budget 3ms --max-drop 1 --out runs/fit

Candidates are architecture × image size × pruning × precision. First all of them are measured untrained; those inside
the budget are distilled for a few epochs, unless there are so few that all can be finalists; the best are trained in
full. Latencies are those of `Classifier.predict` on this machine, accuracies those on validation data. Whatever is
finished stays on disk: the same command goes on after a kill, and another budget, or more candidates, begin with what
is there.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec

from edgefg.artifact.folder import copy_artifact, remove_stale_below
from edgefg.artifact.hashes import sha256
from edgefg.artifact.manifest import Accuracy
from edgefg.data import ImageDataset, load_dataset
from edgefg.errors import DataError, EdgefgError, ExportError, TrainingError, one_line
from edgefg.evaluation.verify import VerifyReport, verify
from edgefg.export.search.artifacts import choose_again
from edgefg.export.search.candidates import (
    Candidate,
    Front,
    Precision,
    Shape,
    Space,
    Stage,
    Target,
    best,
    finalists,
    pareto,
    worth_training,
)
from edgefg.export.search.context import Site, Training
from edgefg.export.search.trials import finished, measure_again, measure_untrained, try_out
from edgefg.export.targets import target_of
from edgefg.files import write_json
from edgefg.settings.gate import Gate
from edgefg.settings.hardware import Hardware
from edgefg.settings.options import options_of, with_options
from edgefg.settings.quantization import QuantizationConfig
from edgefg.training.checkpoint import load, read_header
from edgefg.training.loop.fit import score

FRONT = "front.json"
CHOSEN = "chosen"
_IDENTITY = "compress.json"
# Grows where the same settings give other candidates. 1: cross entropy with DIST and DKD, a strict cap, percentiles;
# 2: NNCF's own range estimators, settings of quantisation in one object.
_VERSION = 2


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What is searched for, and how hard."""

    target: Target
    budget_ms: float
    max_drop: float
    space: Space
    training: Training
    trials: int
    """How many shapes are distilled at most."""
    finalists: int
    """How many of them are trained in full. Where there are more, a short distillation of all decides."""
    device: str | None = None
    """The engine's device."""
    gate: Gate = Gate(max_drop=100)
    """How much worse than its own FP32 network a candidate may be. ``max_drop`` has the loss of top-1, against the
    teacher; the gate's own is for what INT8 alone may take of it."""
    machine: str = ""
    """Where it is measured, in words. What another one measured in this folder is measured again."""
    measure_again: bool = False
    """Measure all latencies anew."""


class _Identity(msgspec.Struct, frozen=True, kw_only=True):
    """What everything in a search's folder was made with."""

    teacher: str
    dataset: str
    target: Target
    device: str | None
    training: Training
    version: int = 0
    """What the same words mean: `_VERSION`."""


def compress(
    teacher: Path,
    data_root: Path,
    out: Path,
    request: Request,
    *,
    hardware: Hardware | None = None,
    skip_corrupt: bool = False,
    say: Callable[[str], None] | None = None,
) -> tuple[Front, VerifyReport | None]:
    """Search for the best student of a teacher that keeps budget and tolerated loss.

    Args:
        teacher: its checkpoint.
        data_root: the data it was trained on; they need validation images.
        out: folder; holds ``front.json`` afterwards and, where a candidate fits, its artifact as ``chosen/``.
        request: what to search for.
        hardware: where to train.
        skip_corrupt: leave unreadable images out.
        say: called with one line before each step, and for each candidate that is left out.

    Returns:
        What was found, and the chosen artifact's verification; None where no candidate fits.

    Raises:
        CheckpointError, DataError: the teacher cannot be used, the data are not its own or have no validation images,
            or ``out`` holds a search of something else.
        WeightsError, TrainingError, ExportError: see the steps.
    """
    say = say or (lambda _: None)
    header = read_header(teacher)
    data = load_dataset(data_root, expected=header, skip_corrupt=skip_corrupt)
    if not data.splits["val"]:
        raise DataError(f"{data_root} has no validation images; needed some to choose a student by")
    _need_nothing_idle(request)
    request = msgspec.structs.replace(request, training=_with_bits(request, out))
    identity = _Identity(
        teacher=sha256(teacher),
        dataset=data.fingerprint,
        target=request.target,
        device=request.device,
        training=request.training,
        version=_VERSION,
    )
    _claim(identity, out)
    remove_stale_below(out)
    site = Site(
        teacher=teacher,
        teacher_accuracy=_teacher_accuracy(teacher, data, out, say),
        data=data,
        input=header.input,
        out=out,
        target=request.target,
        training=request.training,
        device=request.device,
        hardware=hardware or Hardware(),
        gate=request.gate,
        machine=request.machine,
        say=say,
    )
    choose_again(site)
    measure_again(site, request.measure_again)
    front = _search(site, request)
    chosen = _publish(front, out)
    return front, None if chosen is None else verify(
        chosen, data=data.splits["val"], split=front.teacher.data, device=request.device
    )


def _need_nothing_idle(request: Request) -> None:
    """Raise where an option makes no sense, before anything is written: a search's folder keeps what it was given."""
    training = request.training
    quantization = with_options(training.quantization)
    target_of(request.target).check("int8", quantization)
    options = options_of(QuantizationConfig)
    idle = [options[name].flag for name in options if name in quantization.changed() - {"num_samples"}]
    idle += ["--qat-epochs"] if training.qat_epochs else []
    if idle and "int8" not in request.space.precisions:
        raise DataError(f"{idle[0]} applies only to --precision int8. Remove it.")
    if quantization.max_int8_drop is not None and training.qat_epochs:
        # The one is slower for its layers in floating point, the other not: accuracy alone could not choose.
        raise DataError("--max-int8-drop and --qat-epochs serve the same purpose. Remove one of them.")


def _with_bits(request: Request, out: Path) -> Training:
    """Decide how many bits weights take: as asked, as the folder's search has it, or as this CPU needs."""
    training, path, target = request.training, out / _IDENTITY, target_of(request.target)
    quantization = training.quantization
    if quantization.reduce_range is None and path.is_file():
        earlier = _read_identity(path).training.quantization.reduce_range
        quantization = msgspec.structs.replace(quantization, reduce_range=earlier)
    elif "int8" in request.space.precisions:
        quantization = target.decide_range(quantization)
    else:
        quantization = msgspec.structs.replace(quantization, reduce_range=target.weight_bits(quantization) == 7)
    return msgspec.structs.replace(training, quantization=quantization)


def _read_identity(path: Path) -> _Identity:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Identity)
    except msgspec.DecodeError as exc:
        raise DataError(f"{path} is no search's ({exc}); give another --out") from exc


def _search(site: Site, request: Request) -> Front:
    """Go from all candidates to the one that is taken."""
    precisions, budget = request.space.precisions, request.budget_ms
    left_out: list[str] = []

    def leave_out(what: str, why: EdgefgError) -> None:
        site.stop_if_at_fault(why)
        left_out.append(f"{what}: {one_line(why)}")
        site.say(f"left out: {left_out[-1]}")

    untrained = measure_untrained(site, request.space.shapes(), precisions, leave_out)
    if not untrained:
        raise ExportError(f"none of the {len(left_out)} candidates can be made; {'; '.join(left_out)}")
    found = {(candidate.shape, candidate.precision): candidate for candidate in untrained}
    chosen = worth_training(untrained, budget, request.trials)
    keeping = len({one.shape for one in untrained if one.latency_ms <= budget})
    site.say(f"{keeping} of {len(request.space.shapes())} shapes keep {budget:g} ms; {len(chosen)} are distilled")
    if close := [one.name for one in untrained if one.latency_low_ms <= budget < one.latency_ms]:
        site.say(f"close to the budget: {', '.join(close)}; if the machine was busy, --measure-again")

    def try_all(shapes: Sequence[Shape], stage: Stage) -> list[Candidate]:
        tried: list[Candidate] = []
        failures: list[TrainingError] = []
        for shape in shapes:
            try:
                tried += try_out(site, shape, stage, _inside(untrained, shape, budget), leave_out)
            except (ExportError, TrainingError) as exc:
                leave_out(f"{shape.name} ({stage})", exc)
                failures += [exc] if isinstance(exc, TrainingError) else []
            found.update({(candidate.shape, candidate.precision): candidate for candidate in tried})
        if failures and not tried:  # as settings do that no training takes
            raise failures[-1]
        return tried

    if len(chosen) > request.finalists:  # else a short distillation has nothing to decide
        short = try_all(chosen, "short")
        for one in short:
            if one.latency_ms > budget:
                site.say(f"over the budget once trained: {one.name} with {one.latency_ms:.2f} ms")
        chosen = finalists(short, budget, request.finalists)
    full = try_all(chosen, "full")
    # What an earlier search in this folder trained in full is as good a choice.
    earlier = finished(site, [(one.shape, one.precision) for one in untrained if one.latency_ms <= budget], "full")
    full += [one for one in earlier if one not in full]
    found.update({(candidate.shape, candidate.precision): candidate for candidate in full})
    front = _front(site, request, found.values(), left_out)
    taken = best(candidate for candidate in full if front.fits(candidate))
    return front if taken is None else msgspec.structs.replace(front, chosen=taken.name)


def _front(site: Site, request: Request, found: Iterable[Candidate], left_out: Iterable[str]) -> Front:
    """Put together what was found, nothing chosen yet."""
    candidates = tuple(sorted(found, key=lambda candidate: candidate.latency_ms))
    return Front(
        target=request.target,
        device=request.device or "CPU",
        machine=request.machine,
        budget_ms=request.budget_ms,
        max_drop=request.max_drop,
        teacher=site.teacher_accuracy,
        candidates=candidates,
        pareto=tuple(candidate.name for candidate in pareto(candidates)),
        left_out=tuple(left_out),
    )


def _inside(untrained: Sequence[Candidate], shape: Shape, budget: float) -> list[Precision]:
    """Return the precisions in which a shape keeps the budget."""
    return [one.precision for one in untrained if one.shape == shape and one.latency_ms <= budget]


def _claim(identity: _Identity, out: Path) -> None:
    """Write down what the folder's search is made with, or make sure that it is made with the same."""
    path = out / _IDENTITY
    try:
        if path.exists():
            earlier = _read_identity(path)
            names = _Identity.__struct_fields__
            if changed := [name for name in names if getattr(earlier, name) != getattr(identity, name)]:
                raise DataError(f"{out} holds a search with another {' and '.join(changed)}; give another --out")
            return
        if out.exists() and any(out.iterdir()):
            raise DataError(f"{out} is not empty and holds no search; give another --out")
        write_json(path, identity)
    except OSError as exc:
        raise DataError(f"cannot write below {out}: {exc.strerror}") from exc


def _teacher_accuracy(teacher: Path, data: ImageDataset, out: Path, say: Callable[[str], None]) -> Accuracy:
    """Measure the teacher on validation data, once."""
    path = out / "teacher.json"
    if path.is_file():
        return msgspec.json.decode(path.read_bytes(), type=Accuracy)
    say("teacher: measuring on val")
    network, header = load(teacher)
    scores = score(network, data.splits["val"], header.input, batch_size=32, workers=1)
    assert scores is not None  # there are images
    accuracy = Accuracy.of(scores, f"val of {data.root.resolve().name}")
    write_json(path, accuracy)
    return accuracy


def _publish(front: Front, out: Path) -> Path | None:
    """Copy the chosen artifact and write ``front.json``, each whole or not at all; an earlier choice goes.

    Returns the chosen artifact's model file.
    """
    chosen = out / CHOSEN
    taken = [one for one in front.candidates if one.name == front.chosen and one.stage == "full"]
    for candidate in taken:
        copy_artifact(out / candidate.artifact, chosen)
    write_json(out / FRONT, front)
    if not taken:
        shutil.rmtree(chosen, ignore_errors=True)
    return chosen / Path(taken[0].artifact).name if taken else None
