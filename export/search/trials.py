"""The steps of a search for one architecture: measure it untrained, distil and prune it, export it, measure it again.

Each step writes its result to the search's folder, and is not repeated if the result is there.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from shutil import rmtree
from typing import get_args

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
from edgefg.export.search.artifacts import accuracy_of, export_candidate, failures
from edgefg.export.search.candidates import Architecture, Candidate, Stage, Variant
from edgefg.export.search.context import SearchContext
from edgefg.export.tracing.onnx_exporter import write_onnx
from edgefg.files import write_json
from edgefg.image_io import read_image
from edgefg.log import get_logger
from edgefg.preprocess import InputSpec
from edgefg.progress import track
from edgefg.settings.quantization import Precision, QuantizationConfig
from edgefg.training.models.network import Network
from edgefg.training.weights import load_backbone

_log = get_logger(__name__)
_FRAMES = 16
_TURNS, _TIMES = 12, 10
# Enough for untrained networks, of which only the latency is measured: their ranges do not matter.
_CALIBRATION_IMAGES = 8

Quartiles = tuple[float, float, float]
"""Of a latency, in milliseconds."""


def measure_untrained(
    context: SearchContext, architectures: Sequence[Architecture], precisions: Sequence[Precision]
) -> list[Candidate]:
    """Measure the latency of untrained networks, all in turn. Earlier measurements are read.

    Networks that cannot be pruned, quantised or exported are skipped.

    Raises:
        WeightsError: a student's weights cannot be loaded. Nothing was measured.
        DataError: a candidate of the same name has other weights or another share of MACs. Nothing was measured.
    """
    variants: list[Variant] = [(architecture, precision) for architecture in architectures for precision in precisions]
    read_finished(context, variants, "untrained")
    missing = [variant for variant in variants if not context.record(variant, "untrained").is_file()]
    for student in dict.fromkeys(architecture.student for architecture, _ in missing):
        load_backbone(student.backbone, len(context.data.labels), student.weights)
    for architecture in track(dict.fromkeys(architecture for architecture, _ in missing), "writing untrained networks"):
        _write_untrained(context, architecture, [precision for one, precision in missing if one == architecture])
    models = {variant: path for variant in missing if (path := context.model(variant, "untrained")).is_file()}
    if models:
        _log.info("measuring %d untrained networks", len(models))
        for variant, quartiles in measure_latency(context, models, trained=False).items():
            _save(context, _measured(context, variant, "untrained", quartiles))
            rmtree(models[variant].parent)
    return read_finished(context, variants, "untrained")


def run_trial(
    context: SearchContext, architecture: Architecture, stage: Stage, precisions: Sequence[Precision]
) -> list[Candidate]:
    """Train an architecture, export it in some precisions and measure each. Finished candidates are read.

    Precisions that cannot be exported are skipped.

    Raises:
        TrainingError, ExportError: the architecture cannot be trained or pruned.
    """
    variants: list[Variant] = [(architecture, precision) for precision in precisions]
    missing = [variant for variant in variants if not context.record(variant, stage).is_file()]
    if missing:
        _log.info("training %s (%s)", architecture.name, stage)
        checkpoint = train(context, architecture, stage)
        models: dict[Variant, Path] = {}
        for variant in missing:
            try:
                models[variant] = export_candidate(context, checkpoint, variant, stage)
            except ExportError as exc:
                context.skip(f"{architecture.name} {variant[1]} ({stage})", exc)
        _measure_trained(context, models, stage)
    return read_finished(context, variants, stage)


def train(context: SearchContext, architecture: Architecture, stage: Stage) -> Path:
    """Distil an architecture and prune it if it is to be pruned. Returns the checkpoint. Interrupted runs resume."""
    config = context.candidates
    unpruned = distill(
        context.teacher,
        context.data,
        context.folder(replace(architecture, macs=1.0), stage),
        context.training_of(architecture, stage),
        student=architecture.student.backbone,
        weights=architecture.student.weights,
        distillation=config.distillation,
        teacher_cache=None if config.distillation.needs_maps else context.teacher_cache,
        hardware=context.hardware,
    )
    if architecture.macs == 1:
        return unpruned
    return prune(
        unpruned,
        context.data,
        context.folder(architecture, stage),
        context.pruning_training_of(architecture, stage),
        context.pruning_of(architecture),
        teacher_path=context.teacher,
        distillation=config.distillation,
        teacher_cache=context.teacher_cache,
        hardware=context.hardware,
    )


def read_finished(context: SearchContext, variants: Iterable[Variant], stage: Stage) -> list[Candidate]:
    """Read the candidates that finished a stage earlier.

    Raises:
        DataError: a candidate of the same name has other weights or another share of MACs.
    """
    return [_read(context, variant, stage) for variant in variants if context.record(variant, stage).is_file()]


def measure_again(context: SearchContext) -> None:
    """Measure again what another machine measured, or everything if the search asks for it.

    Latencies of untrained networks are only forgotten here, and so are candidates whose artifact was deleted.
    """
    for stage in get_args(Stage):
        models: dict[Variant, Path] = {}
        for path in sorted((context.out / stage).glob("*/*.json")):
            found = msgspec.json.decode(path.read_bytes(), type=Candidate)
            lost = stage != "untrained" and not (context.out / found.artifact).is_file()
            if found.machine == context.machine and not context.search.measure_again and not lost:
                continue
            if stage == "untrained" or lost:
                path.unlink()
            else:
                models[found.variant] = context.out / found.artifact
        if models:
            _log.info("measuring %d trained networks again", len(models))
            _measure_trained(context, models, stage)


def measure_latency(
    context: SearchContext, models: Mapping[Variant, Path], *, trained: bool = True
) -> dict[Variant, Quartiles]:
    """Measure the time of `Classifier.predict` on photographs of the data. All models take turns.

    Untrained models have no manifest.
    """
    frames = [read_image(path) for path, _ in context.data.splits["val"][:_FRAMES]]
    with ExitStack() as stack:
        calls = []
        for (architecture, _), path in models.items():
            labels, spec = (None, None) if trained else (context.data.labels, context.input_of(architecture))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a model without a manifest
                classifier = Classifier(path, device=context.device, labels=labels, input=spec)
            calls.append(in_turn(stack.enter_context(classifier).predict, frames))
        seconds = alternate(calls, turns=_TURNS, times=_TIMES)
    quartiles = 1e3 * np.percentile(seconds, (25, 50, 75), axis=1).T
    return {
        variant: (float(low), float(median), float(high))
        for variant, (low, median, high) in zip(models, quartiles, strict=True)
    }


def _measure_trained(context: SearchContext, models: Mapping[Variant, Path], stage: Stage) -> None:
    """Measure trained candidates and write down what is known of them."""
    for variant, quartiles in (measure_latency(context, models) if models else {}).items():
        accuracy = accuracy_of(models[variant])
        candidate = replace(
            _measured(context, variant, stage, quartiles),
            accuracy=accuracy,
            drop=100 * (context.teacher_accuracy.top1 - accuracy.top1),
            artifact=str(models[variant].relative_to(context.out)),
        )
        _save(context, candidate)


def _measured(context: SearchContext, variant: Variant, stage: Stage, quartiles: Quartiles) -> Candidate:
    architecture, precision = variant
    low, median, high = quartiles
    return Candidate(
        architecture=architecture,
        precision=precision,
        stage=stage,
        latency_ms=median,
        latency_low_ms=low,
        latency_high_ms=high,
        machine=context.machine,
    )


def _write_untrained(context: SearchContext, architecture: Architecture, precisions: Sequence[Precision]) -> None:
    """Write the model files of an untrained network, pruned by magnitude. Files of an interrupted search are kept."""
    variants: list[Variant] = [(architecture, precision) for precision in precisions]
    folders = {variant: context.model(variant, "untrained").parent for variant in variants}
    missing = [variant for variant in variants if not context.model(variant, "untrained").is_file()]
    if not missing:
        return
    student, spec = architecture.student, context.input_of(architecture)
    body, mean, std = load_backbone(student.backbone, len(context.data.labels), student.weights)
    network = Network(body, mean, std).eval()
    with tempfile.TemporaryDirectory(prefix="edgefg-") as scratch:
        source = Path(scratch) / "model.onnx"
        try:
            if architecture.macs < 1:
                cost_model = CostModel(copy.deepcopy(network), spec)
                pruning = replace(context.pruning_of(architecture), importance="magnitude")
                remove_channels(network, pruning, cost_model, architecture.macs, lambda _: None)
            write_onnx(network.eval(), spec, source)
        except ExportError as exc:
            for _, precision in missing:
                context.skip(f"{architecture.name} {precision}", exc)
            return
        for variant in missing:
            try:
                # Renamed when it is complete: an interrupted search uses the folders that it finds.
                with folder_beside(folders[variant]) as temporary:
                    _write_graph(context, source, spec, variant[1], temporary)
                    temporary.rename(folders[variant])
            except ExportError as exc:
                context.skip(f"{architecture.name} {variant[1]}", exc)


def _write_graph(context: SearchContext, source: Path, spec: InputSpec, precision: Precision, folder: Path) -> None:
    """Write the model file of an untrained network to a folder."""
    if precision == "int8":
        paths = choose_balanced(context.data.splits["train"], _CALIBRATION_IMAGES)
        inputs = read_calibration(paths, spec).inputs
        config = QuantizationConfig(reduce_range=context.candidates.quantization.reduce_range)
        context.target.quantizer(source, inputs, config).write(folder)
    else:
        context.target.emit(source, folder)


def _save(context: SearchContext, candidate: Candidate) -> None:
    write_json(context.record(candidate.variant, candidate.stage), candidate)


def _read(context: SearchContext, variant: Variant, stage: Stage) -> Candidate:
    found = msgspec.json.decode(context.record(variant, stage).read_bytes(), type=Candidate)
    if found.architecture != variant[0]:
        earlier, asked = (
            f"{one.student.backbone}={one.student.weights} with {one.macs:g} of the MACs"
            for one in (found.architecture, variant[0])
        )
        raise DataError(f"{found.name} in {context.out} is {earlier}, not {asked}. Use another --out")
    return replace(found, failures=failures(context, context.out / found.artifact)) if found.artifact else found
