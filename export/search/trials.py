"""The steps that a search takes with one candidate: an untrained graph, a short or full distillation, an artifact.

Every step leaves its result below the search's folder and is not taken again where it is there.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec
import numpy as np
from msgspec.structs import replace

from edgefg.artifact.folder import folder_beside
from edgefg.classifier import Classifier
from edgefg.data.calibration import choose_balanced, read_calibration
from edgefg.errors import DataError, ExportError
from edgefg.evaluation.timing import alternate, in_turn
from edgefg.export.distill.distill import distill
from edgefg.export.prune.channels import remove_channels
from edgefg.export.prune.cost import CostModel
from edgefg.export.prune.prune import prune
from edgefg.export.search.artifacts import LeaveOut, accuracy_of, export_candidate, failures
from edgefg.export.search.candidates import Candidate, Precision, Shape, Stage
from edgefg.export.search.context import Site
from edgefg.export.targets import target_of
from edgefg.export.tracing.onnx_exporter import write_onnx
from edgefg.files import write_json
from edgefg.image_io import read_image
from edgefg.preprocess import InputSpec
from edgefg.settings.pruning import PruningConfig
from edgefg.settings.quantization import QuantizationConfig
from edgefg.training.models.network import Network
from edgefg.training.weights import load_backbone

_FRAMES = 16
_TURNS, _TIMES = 12, 10
# Of an untrained graph the time alone matters: what its ranges are is of no account.
_CALIBRATION_IMAGES = 8


def measure_untrained(
    site: Site, shapes: Sequence[Shape], precisions: Sequence[Precision], leave_out: LeaveOut
) -> list[Candidate]:
    """Measure how long untrained networks take, all of them in turn; those that were measured before are read.

    Those that cannot be pruned, quantised or exported are given to ``leave_out``.

    Raises:
        WeightsError: a student has no such weights; before anything is done.
        DataError: one was measured with other weights, or pruned otherwise, before.
    """
    every = [(shape, precision) for shape in shapes for precision in precisions]
    missing = [key for key in every if not site.record(*key, "untrained").is_file()]
    for key in every:
        if key not in missing:
            _read(site, *key, "untrained")  # raises before anything is done
    for student in dict.fromkeys(shape.student for shape, _ in missing):
        load_backbone(student.backbone, len(site.data.labels), student.weights)  # raises before anything is done
    made = _make_untrained(site, missing, leave_out)
    if made:
        site.say(f"measuring {len(made)} untrained networks")
        times = measure_latency(made, site, {key: site.spec(key[0]) for key in made})
        for (shape, precision), (low, middle, high) in times.items():
            _write_down(
                Candidate(
                    shape=shape,
                    precision=precision,
                    stage="untrained",
                    latency_ms=middle,
                    latency_low_ms=low,
                    latency_high_ms=high,
                    machine=site.machine,
                ),
                site,
            )
            shutil.rmtree(made[shape, precision].parent)
    return finished(site, every, "untrained")


def _make_untrained(
    site: Site, missing: Sequence[tuple[Shape, Precision]], leave_out: LeaveOut
) -> dict[tuple[Shape, Precision], Path]:
    """Write untrained networks; return the files of those that can be made."""
    made: dict[tuple[Shape, Precision], Path] = {}
    for shape in dict.fromkeys(shape for shape, _ in missing):
        folder = site.out / "untrained" / shape.name
        paths = {one: folder / one / target_of(site.target).model_name for other, one in missing if other == shape}
        if lacking := {precision: path for precision, path in paths.items() if not path.is_file()}:
            site.say(f"untrained: {shape.name}")
            _write_untrained(site, shape, lacking, leave_out)
        made.update({(shape, precision): path for precision, path in paths.items() if path.is_file()})
    return made


def train(site: Site, shape: Shape, stage: Stage) -> Path:
    """Distil a shape, and prune it where it asks for that; return its checkpoint. Resumes; see `distill`, `prune`."""
    trunk = distill(
        site.teacher,
        site.data,
        site.out / stage / shape.trunk,
        site.training.of(shape.size, stage),
        student=shape.student.backbone,
        weights=shape.student.weights,
        distillation=site.training.distillation,
        teacher_cache=None if site.training.distillation.needs_maps else site.teacher_cache,
        hardware=site.hardware,
    )
    if shape.macs == 1:
        return trunk
    return prune(
        trunk,
        site.data,
        site.out / stage / shape.name,
        site.training.after_pruning(shape.size, stage),
        _pruning(site, shape),
        teacher_path=site.teacher,
        distillation=site.training.distillation,
        teacher_cache=site.teacher_cache,
        hardware=site.hardware,
    )


def try_out(
    site: Site, shape: Shape, stage: Stage, precisions: Sequence[Precision], leave_out: LeaveOut
) -> list[Candidate]:
    """Train a shape, export it in some precisions and measure each; what was done before is read.

    What cannot be exported, or not be trained in INT8, is given to ``leave_out``.

    Raises:
        TrainingError, ExportError: the shape cannot be trained, or not be pruned.
    """
    missing = [precision for precision in precisions if not site.record(shape, precision, stage).is_file()]
    if missing:
        site.say(f"{stage}: {shape.name}")
        checkpoint = train(site, shape, stage)
        models: dict[tuple[Shape, Precision], Path] = {}
        for precision in missing:
            try:
                models[shape, precision] = export_candidate(site, checkpoint, shape, stage, precision, leave_out)
            except ExportError as exc:
                leave_out(f"{shape.name} {precision} ({stage})", exc)
        for key, quartiles in (measure_latency(models, site) if models else {}).items():
            _write_down(_candidate(site, *key, stage, quartiles), site)
    return finished(site, [(shape, precision) for precision in precisions], stage)


def finished(site: Site, keys: Iterable[tuple[Shape, Precision]], stage: Stage) -> list[Candidate]:
    """Read those candidates that were tried at a stage before."""
    return [_read(site, *key, stage) for key in keys if site.record(*key, stage).is_file()]


def measure_again(site: Site, everything: bool) -> None:
    """Forget the latencies that another machine measured, or all; those of trained candidates are measured anew.

    A candidate whose artifact is gone is forgotten too.
    """
    stages: tuple[Stage, ...] = ("untrained", "short", "full")
    for stage in stages:
        models: dict[tuple[Shape, Precision], Path] = {}
        for path in sorted((site.out / stage).glob("*/*.json")):
            found = msgspec.json.decode(path.read_bytes(), type=Candidate)
            lost = stage != "untrained" and not (site.out / found.artifact).is_file()
            if found.machine == site.machine and not everything and not lost:
                continue
            if stage == "untrained" or lost:
                path.unlink()
            else:
                models[found.shape, found.precision] = site.out / found.artifact
        if models:
            site.say(f"measuring {len(models)} trained networks again")
            for key, quartiles in measure_latency(models, site).items():
                _write_down(_candidate(site, *key, stage, quartiles), site)


def _candidate(
    site: Site, shape: Shape, precision: Precision, stage: Stage, times: tuple[float, float, float]
) -> Candidate:
    """Put together what is known of a trained candidate."""
    model = site.out / stage / shape.name / precision / target_of(site.target).model_name
    accuracy = accuracy_of(model)
    low, middle, high = times
    return Candidate(
        shape=shape,
        precision=precision,
        stage=stage,
        latency_ms=middle,
        latency_low_ms=low,
        latency_high_ms=high,
        accuracy=accuracy,
        drop=100 * (site.teacher_accuracy.top1 - accuracy.top1),
        artifact=str(model.relative_to(site.out)),
        machine=site.machine,
    )


def measure_latency(
    models: Mapping[tuple[Shape, Precision], Path],
    site: Site,
    bare: Mapping[tuple[Shape, Precision], InputSpec] | None = None,
) -> dict[tuple[Shape, Precision], tuple[float, float, float]]:
    """Return quartiles of the time of `Classifier.predict`, milliseconds, on photographs; all models take turns.

    ``bare`` are the inputs of models that have no manifest yet.
    """
    frames = [read_image(path) for path, _ in site.data.splits["val"][:_FRAMES]]
    with ExitStack() as stack:
        calls = []
        for key, path in models.items():
            labels, spec = (None, None) if bare is None else (site.data.labels, bare[key])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that nothing proves a bare model
                classifier = Classifier(path, device=site.device, labels=labels, input=spec)
            calls.append(in_turn(stack.enter_context(classifier).predict, frames))
        seconds = alternate(calls, turns=_TURNS, times=_TIMES)
    quartiles = 1e3 * np.percentile(seconds, (25, 50, 75), axis=1).T
    return {
        key: (float(low), float(middle), float(high))
        for key, (low, middle, high) in zip(models, quartiles, strict=True)
    }


def _write_untrained(site: Site, shape: Shape, made: Mapping[Precision, Path], leave_out: LeaveOut) -> None:
    """Write the graphs of an untrained network, pruned by magnitude where the shape is pruned."""
    body, mean, std = load_backbone(shape.student.backbone, len(site.data.labels), shape.student.weights)
    network, spec = Network(body, mean, std).eval(), site.spec(shape)
    with tempfile.TemporaryDirectory(prefix="edgefg-") as scratch:
        source = Path(scratch) / "model.onnx"
        try:
            if shape.macs < 1:
                cost_model = CostModel(copy.deepcopy(network), spec)
                pruning = replace(_pruning(site, shape), importance="magnitude")
                remove_channels(network, pruning, cost_model, shape.macs, lambda _: None)
            write_onnx(network.eval(), spec, source)
        except ExportError as exc:
            for precision in made:
                leave_out(f"{shape.name} {precision}", exc)
            return
        for precision, path in made.items():
            try:
                # Renamed when it is whole: a search that is cut off takes what it finds.
                with folder_beside(path.parent) as temporary:
                    _write_graph(site, source, spec, precision, temporary)
                    temporary.rename(path.parent)
            except ExportError as exc:
                leave_out(f"{shape.name} {precision}", exc)


def _write_graph(site: Site, source: Path, spec: InputSpec, precision: Precision, folder: Path) -> None:
    """Write an untrained network's model file into a folder."""
    if precision == "int8":
        paths = choose_balanced(site.data.splits["train"], _CALIBRATION_IMAGES)
        inputs = read_calibration(paths, spec).inputs
        config = QuantizationConfig(reduce_range=site.training.quantization.reduce_range)
        target_of(site.target).quantizer(source, inputs, config).write(folder)
    else:
        target_of(site.target).emit(source, folder)


def _pruning(site: Site, shape: Shape) -> PruningConfig:
    # The default cap of a layer's loss is met well before half of the operations are gone.
    cap = min(0.95, max(PruningConfig().max_ratio, 1.05 - shape.macs))
    return replace(site.training.pruning, macs=shape.macs, max_ratio=cap)


def _write_down(candidate: Candidate, site: Site) -> None:
    path = site.record(candidate.shape, candidate.precision, candidate.stage)
    write_json(path, candidate)


def _read(site: Site, shape: Shape, precision: Precision, stage: Stage) -> Candidate:
    """Read a candidate that was written down. Raises `DataError` where one of its name was made otherwise."""
    found = msgspec.json.decode(site.record(shape, precision, stage).read_bytes(), type=Candidate)
    if found.shape != shape:
        earlier, asked = (
            f"{one.student.backbone}={one.student.weights}, MACs {one.macs:g}" for one in (found.shape, shape)
        )
        raise DataError(f"{site.out} holds {found.name} as {earlier}, asked was {asked}; give another --out")
    return replace(found, failures=failures(site, site.out / found.artifact)) if found.artifact else found
