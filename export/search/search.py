"""Search for the best student within a latency budget.

    edgefg compress runs/x/teacher.safetensors DATA --to openvino --budget 3ms --max-drop 1 --out runs/fit

Candidates are backbone × image size × pruning × precision. All of them are measured untrained. Those within the budget
are distilled for a few epochs. This step is skipped if all of them can be finalists. The best are then trained in full.
Latencies are those of `Classifier.predict` on this machine, accuracies those on validation images. All results stay on
disk: the same command resumes an interrupted search, and a search with another budget or more candidates uses them.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec.structs import replace

from edgefg.artifact.folder import copy_artifact, remove_stale_below
from edgefg.artifact.hashes import sha256
from edgefg.artifact.manifest import Accuracy
from edgefg.benchmarks.device import describe
from edgefg.data import ImageDataset, load_dataset
from edgefg.errors import DataError, ExportError, TrainingError
from edgefg.evaluation.verify import VerifyReport, verify
from edgefg.export.search.artifacts import select_again
from edgefg.export.search.candidates import (
    Architecture,
    Candidate,
    ParetoFront,
    Stage,
    most_accurate,
    pareto,
    search_space,
    select_finalists,
    shortlist,
)
from edgefg.export.search.context import SearchContext
from edgefg.export.search.trials import measure_again, measure_untrained, read_finished, run_trial
from edgefg.export.targets import TARGETS, target_of
from edgefg.files import write_json
from edgefg.log import get_logger
from edgefg.settings.gate import Gate
from edgefg.settings.hardware import Hardware
from edgefg.settings.options import differences, options_of, with_options
from edgefg.settings.quantization import QuantizationConfig, TargetName
from edgefg.settings.search import CandidateConfig, SearchConfig, TrialSchedule
from edgefg.training.checkpoint import load, read_header
from edgefg.training.loop.fit import score

_log = get_logger(__name__)

FRONT = "front.json"
CHOSEN = "chosen"
_IDENTITY = "compress.json"
# Raised when the same settings make other candidates, or when the folder's files change.
_VERSION = 3

_SEARCH = SearchConfig()
_CANDIDATES = CandidateConfig()
# The loss of top-1 is limited against the teacher, not against the FP32 network.
_GATE = Gate(max_drop=100)


class _Identity(msgspec.Struct, frozen=True, kw_only=True):
    """Inputs and settings that all candidates in a folder share."""

    version: int
    teacher: str
    dataset: str
    target: TargetName
    device: str | None
    schedule: TrialSchedule
    candidates: CandidateConfig


def compress(
    teacher: Path,
    data_root: Path,
    out: Path,
    *,
    to: TargetName,
    budget_ms: float,
    search: SearchConfig = _SEARCH,
    candidates: CandidateConfig = _CANDIDATES,
    gate: Gate = _GATE,
    device: str | None = None,
    hardware: Hardware | None = None,
    skip_corrupt: bool = False,
) -> tuple[ParetoFront, VerifyReport | None]:
    """Search for the most accurate student of a teacher within a latency budget.

    Args:
        teacher: checkpoint of the teacher.
        data_root: the data that it was trained on. They must have validation images.
        out: folder for ``front.json``, for the chosen artifact, ``chosen/``, and for all intermediate results.
        to: target. Its engine has to run on this machine, so ``tensorrt-onnx`` is not available.
        budget_ms: largest median latency of a prediction on this machine, in milliseconds.
        search: the search space, and how many candidates are trained.
        candidates: how candidates are trained and exported.
        gate: how much worse than its own FP32 network a candidate may be.
        device: device of the inference engine.
        hardware: where to train.
        skip_corrupt: leave unreadable images out instead of raising.

    Returns:
        The candidates, and the verification of the chosen one. None: no candidate is feasible.

    Raises:
        CheckpointError: the teacher cannot be used.
        DataError: a setting is out of range, the data are not the teacher's or have no validation images, or ``out``
            holds another search.
        WeightsError, TrainingError, ExportError: a step failed for all candidates.
    """
    header = read_header(teacher)
    data = load_dataset(data_root, expected=header, skip_corrupt=skip_corrupt)
    if not data.splits["val"]:
        raise DataError(f"{data_root} has no validation images to choose a student by. Add some")
    search, candidates = with_options(search), with_options(candidates)
    architectures = search_space(search, header.input.height)
    _check_settings(to, search, candidates.quantization)
    quantization = _with_range(to, search, candidates.quantization, out)
    candidates = replace(candidates, quantization=quantization)
    identity = _Identity(
        version=_VERSION,
        teacher=sha256(teacher),
        dataset=data.fingerprint,
        target=to,
        device=device,
        schedule=search.schedule,
        candidates=candidates,
    )
    _claim(identity, out)
    remove_stale_below(out)
    context = SearchContext(
        teacher=teacher,
        teacher_accuracy=_teacher_accuracy(teacher, data, out),
        data=data,
        input=header.input,
        out=out,
        to=to,
        device=device,
        machine=_machine(to),
        search=search,
        candidates=candidates,
        gate=gate,
        hardware=hardware or Hardware(),
    )
    select_again(context)
    measure_again(context)
    front = _run(context, architectures, budget_ms)
    chosen = _publish(front, out)
    return front, None if chosen is None else verify(
        chosen, data=data.splits["val"], split=front.teacher.data, device=device
    )


def _check_settings(to: TargetName, search: SearchConfig, quantization: QuantizationConfig) -> None:
    """Raise if an option has no effect or contradicts another one, before anything is written."""
    target = target_of(to)
    if target.engine is None:
        measurable = " or ".join(name for name, one in TARGETS.items() if one.engine is not None)
        raise DataError(f"--to {to} cannot be measured on this machine. Use {measurable}")
    target.check("int8", quantization)
    options = options_of(QuantizationConfig)
    unused = [options[name].flag for name in options if name in quantization.changed() - {"num_samples"}]
    unused += ["--qat-epochs"] if search.schedule.qat_epochs else []
    if unused and "int8" not in search.precisions:
        raise DataError(f"{unused[0]} applies only to --precision int8. Remove it")
    if quantization.max_int8_drop is not None and search.schedule.qat_epochs:
        # Layers in floating point make a network slower, so accuracy could not decide between the two.
        raise DataError("--max-int8-drop and --qat-epochs serve the same purpose. Remove one of them")


def _with_range(
    to: TargetName, search: SearchConfig, quantization: QuantizationConfig, out: Path
) -> QuantizationConfig:
    """Decide ``reduce_range``: as asked for, else as in the folder's earlier search, else as this CPU needs it."""
    if quantization.reduce_range is None and (out / _IDENTITY).is_file():
        earlier = _read_identity(out)
        return replace(quantization, reduce_range=earlier.candidates.quantization.reduce_range)
    target = target_of(to)
    if "int8" in search.precisions:
        return target.decide_range(quantization)
    return replace(quantization, reduce_range=target.weight_bits(quantization) == 7)


def _claim(identity: _Identity, out: Path) -> None:
    """Write the search's identity to its folder. Raises `DataError` if the folder holds another search."""
    try:
        if (out / _IDENTITY).exists():
            found = differences(msgspec.to_builtins(_read_identity(out)), msgspec.to_builtins(identity))
            if names := dict.fromkeys(name for name, _, _ in found):
                raise DataError(f"{out} holds a search with another {' and '.join(names)}. Use another --out")
            return
        if out.exists() and any(out.iterdir()):
            raise DataError(f"{out} is not empty and does not hold a search. Use another --out")
        write_json(out / _IDENTITY, identity)
    except OSError as exc:
        raise DataError(f"cannot write to {out}: {exc.strerror}") from exc


def _read_identity(out: Path) -> _Identity:
    try:
        identity = msgspec.json.decode((out / _IDENTITY).read_bytes(), type=_Identity)
    except msgspec.DecodeError:
        identity = None
    if identity is None or identity.version != _VERSION:
        raise DataError(f"{out} holds a search of another version of edgefg. Use another --out")
    return identity


def _machine(to: TargetName) -> str:
    """Describe what latencies depend on: processor, cores and engine."""
    device, engine = describe(), target_of(to).engine
    assert engine is not None  # see `_check_settings`
    return f"{device.cpu}, {device.cores} cores, {engine} {device.versions.get(engine)}"


def _teacher_accuracy(teacher: Path, data: ImageDataset, out: Path) -> Accuracy:
    """Measure the teacher on validation images, unless it was measured before."""
    path = out / "teacher.json"
    if path.is_file():
        return msgspec.json.decode(path.read_bytes(), type=Accuracy)
    _log.info("measuring the teacher on validation images")
    network, header = load(teacher)
    scores = score(network, data.splits["val"], header.input, batch_size=32, workers=1)
    assert scores is not None  # there are images
    accuracy = Accuracy.of(scores, f"val of {data.root.resolve().name}")
    write_json(path, accuracy)
    return accuracy


def _run(context: SearchContext, architectures: Sequence[Architecture], budget_ms: float) -> ParetoFront:
    """Measure, train and compare the candidates."""
    search = context.search
    untrained = measure_untrained(context, architectures, search.precisions)
    if not untrained:
        raise ExportError(f"none of the candidates can be exported: {'; '.join(context.skipped)}")
    fast = [one for one in untrained if one.latency_ms <= budget_ms]
    selected = shortlist(untrained, budget_ms, search.trials)
    _log.info(
        "%d of %d architectures keep %g ms, %d are trained",
        len({one.architecture for one in fast}),
        len(architectures),
        budget_ms,
        len(selected),
    )
    if close := [one.name for one in untrained if one.latency_low_ms <= budget_ms < one.latency_ms]:
        _log.warning("just over the budget: %s. If the machine was busy, use --measure-again", ", ".join(close))
    short: list[Candidate] = []
    if len(selected) > search.finalists:
        short = _run_trials(context, selected, "short", fast)
        for one in short:
            if one.latency_ms > budget_ms:
                _log.warning("%s takes %.2f ms now that it is trained, more than the budget", one.name, one.latency_ms)
        selected = select_finalists(short, budget_ms, search.finalists)
    full = _run_trials(context, selected, "full", fast)
    # Candidates that an earlier search in this folder trained in full compete too.
    full += [one for one in read_finished(context, [one.variant for one in fast], "full") if one not in full]
    measured = {one.variant: one for one in (*untrained, *short, *full)}
    front = _front(context, sorted(measured.values(), key=lambda one: one.latency_ms), budget_ms)
    chosen = most_accurate(one for one in full if front.is_feasible(one))
    return front if chosen is None else replace(front, chosen=chosen.name)


def _run_trials(
    context: SearchContext, architectures: Sequence[Architecture], stage: Stage, fast: Sequence[Candidate]
) -> list[Candidate]:
    """Run the trials of a stage, each in the precisions that are fast enough. Failed trials are skipped.

    Raises:
        TrainingError: no trial succeeded, and a training failed: the settings may be at fault.
    """
    found: list[Candidate] = []
    failure: TrainingError | None = None
    for architecture in architectures:
        precisions = [one.precision for one in fast if one.architecture == architecture]
        try:
            found += run_trial(context, architecture, stage, precisions)
        except (ExportError, TrainingError) as exc:
            context.skip(f"{architecture.name} ({stage})", exc)
            failure = exc if isinstance(exc, TrainingError) else failure
    if failure is not None and not found:
        raise failure
    return found


def _front(context: SearchContext, candidates: Sequence[Candidate], budget_ms: float) -> ParetoFront:
    return ParetoFront(
        target=context.to,
        device=context.device or "CPU",
        machine=context.machine,
        budget_ms=budget_ms,
        max_drop=context.search.max_drop,
        teacher=context.teacher_accuracy,
        candidates=tuple(candidates),
        pareto=tuple(candidate.name for candidate in pareto(candidates)),
        skipped=tuple(context.skipped),
    )


def _publish(front: ParetoFront, out: Path) -> Path | None:
    """Copy the chosen artifact and write ``front.json``, each completely or not at all. Returns the model file.

    If no candidate was chosen, the artifact of an earlier search is removed.
    """
    folder = out / CHOSEN
    chosen = next((one for one in front.candidates if one.name == front.chosen and one.stage == "full"), None)
    model = None if chosen is None else copy_artifact(out / chosen.artifact, folder)
    write_json(out / FRONT, front)
    if model is None:
        shutil.rmtree(folder, ignore_errors=True)
    return model
