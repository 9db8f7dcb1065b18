"""The artifacts of candidates: calibrated or, for INT8 finalists, also trained with quantisation; and their gate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from msgspec.structs import replace

from edgefg.artifact.folder import copy_artifact
from edgefg.artifact.manifest import Accuracy, read_manifest
from edgefg.errors import ExportError, TrainingError
from edgefg.evaluation.gate import judge
from edgefg.export.export import export_checkpoint
from edgefg.export.qat.qat import qat
from edgefg.export.search.candidates import Architecture, Stage, Variant
from edgefg.export.search.context import SearchContext
from edgefg.log import get_logger
from edgefg.settings.quantization import Precision, QuantizationConfig

_log = get_logger(__name__)
# Folders of an INT8 finalist's two artifacts; the better one is copied to ``int8``.
_CALIBRATED, _QAT = "int8-calibrated", "int8-qat"


def export_candidate(context: SearchContext, checkpoint: Path, variant: Variant, stage: Stage) -> Path:
    """Export a trained architecture in one precision, unless it was exported before. Returns the model file.

    If the search asks for quantisation-aware training, an INT8 finalist is exported both with and without it.

    Raises:
        ExportError: the candidate cannot be exported.
    """
    architecture, precision = variant
    model, full = context.model(variant, stage), stage == "full"
    if model.is_file():
        return model
    if precision == "int8" and full and context.search.schedule.qat_epochs:
        return _export_both(context, checkpoint, architecture)
    quantization = QuantizationConfig()
    if precision == "int8":
        quantization = context.candidates.quantization
        quantization = quantization if full else replace(quantization, max_int8_drop=None)
    return _export(context, checkpoint, model, precision, quantization)


def accuracy_of(model: Path) -> Accuracy:
    """Return the accuracy of a candidate's artifact on validation images."""
    accuracy = read_manifest(model).accuracy
    assert accuracy is not None  # a search has validation images
    return accuracy


def failures(context: SearchContext, model: Path) -> tuple[str, ...]:
    """Return the limits of the gate that an artifact does not keep against its own FP32 network."""
    comparison = read_manifest(model).comparison
    return () if comparison is None else judge(comparison, context.gate)


def select_again(context: SearchContext) -> None:
    """Select between calibration and quantisation-aware training again, because the gate may have changed.

    The latency of a replaced artifact is forgotten.
    """
    for folder in sorted((context.out / "full").glob("*/int8")):
        model = folder / context.target.model_name
        both = [folder.with_name(name) / model.name for name in (_CALIBRATED, _QAT)]
        if not all(one.is_file() for one in (model, *both)):
            continue
        better = _better(context, both)
        if read_manifest(better) != read_manifest(model):
            _log.info("selected: %s", better.parent.relative_to(context.out))
            copy_artifact(better, folder)
            folder.with_suffix(".json").unlink(missing_ok=True)


def _export_both(context: SearchContext, checkpoint: Path, architecture: Architecture) -> Path:
    """Export an INT8 finalist with and without quantisation-aware training, and keep the better artifact."""
    model = context.model((architecture, "int8"), "full")
    made: list[Path] = []
    for name in (_CALIBRATED, _QAT):
        path = model.parent.with_name(name) / model.name
        try:
            if name == _QAT:
                trained = _train_in_int8(context, checkpoint, architecture)
                made.append(_export(context, trained, path, "int8", QuantizationConfig(), reference=checkpoint))
            else:
                made.append(_export(context, checkpoint, path, "int8", context.candidates.quantization))
        except (ExportError, TrainingError) as exc:
            context.skip(f"{architecture.name} {name} (full)", exc)
    if not made:
        raise ExportError("neither calibration nor quantisation-aware training succeeded")
    better = _better(context, made)
    _log.info("selected: %s", better.parent.relative_to(context.out))
    return copy_artifact(better, model.parent)


def _better(context: SearchContext, models: Sequence[Path]) -> Path:
    """Return the artifact that passes the gate and then the more accurate one. The first one of equals is returned."""
    return max(models, key=lambda model: (not failures(context, model), accuracy_of(model).top1))


def _export(
    context: SearchContext,
    checkpoint: Path,
    model: Path,
    precision: Precision,
    quantization: QuantizationConfig,
    *,
    reference: Path | None = None,
) -> Path:
    """Export a checkpoint to a model file, unless it is there already.

    The gate is not enforced here, since a candidate that fails it is a result too (see `failures`).
    """
    if model.is_file():
        return model
    _log.info("exporting %s", model.parent.relative_to(context.out))
    return export_checkpoint(
        checkpoint,
        model.parent,
        to=context.to,
        precision=precision,
        calibration=context.data,
        config=context.candidates.export,
        quantization=quantization,
        gate=None,
        reference=reference,
    )


def _train_in_int8(context: SearchContext, checkpoint: Path, architecture: Architecture) -> Path:
    """Fine-tune a finalist with quantisation-aware training. Returns the checkpoint."""
    return qat(
        checkpoint,
        context.data,
        context.folder(architecture, "full") / "qat",
        context.qat_training_of(architecture),
        to=context.to,
        teacher_path=context.teacher,
        distillation=context.candidates.distillation,
        teacher_cache=context.teacher_cache,
        quantization=context.candidates.quantization,
        hardware=context.hardware,
    )
