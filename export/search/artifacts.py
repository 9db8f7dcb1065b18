"""The artifacts of a search's candidates: exported calibrated, trained in INT8 where that was asked, and judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from msgspec.structs import replace

from edgefg.artifact.folder import copy_artifact
from edgefg.artifact.manifest import Accuracy, read_manifest
from edgefg.errors import EdgefgError, ExportError, TrainingError
from edgefg.evaluation.gate import judge
from edgefg.export.export import export_checkpoint
from edgefg.export.qat.qat import qat
from edgefg.export.search.candidates import Precision, Shape, Stage
from edgefg.export.search.context import Site
from edgefg.export.targets import target_of
from edgefg.settings.export import ExportConfig
from edgefg.settings.quantization import QuantizationConfig

# Called with what is left out and why.
LeaveOut = Callable[[str, EdgefgError], None]


def export_candidate(
    site: Site, checkpoint: Path, shape: Shape, stage: Stage, precision: Precision, leave_out: LeaveOut
) -> Path:
    """Export a trained shape, unless it was before, and return its model file.

    A finalist that is trained in INT8 too is exported both ways, and the better one taken.

    Raises:
        ExportError: it cannot be exported.
    """
    folder = site.out / stage / shape.name / precision
    full = stage == "full"
    if (model := folder / target_of(site.target).model_name).is_file():
        return model
    if precision == "int8" and full and site.training.qat_epochs:
        return _better_of_both(site, checkpoint, shape, folder, leave_out)
    drop = site.training.quantization.max_int8_drop if full else None
    return _export(site, checkpoint, folder, precision, max_int8_drop=drop)


def accuracy_of(model: Path) -> Accuracy:
    """Read the accuracy of a candidate's artifact on validation data."""
    accuracy = read_manifest(model).accuracy
    assert accuracy is not None  # a search has validation data
    return accuracy


def failures(site: Site, model: Path) -> tuple[str, ...]:
    """Return the limits of the gate that an artifact does not keep against its own FP32 network."""
    comparison = read_manifest(model).comparison
    return () if comparison is None else judge(comparison, site.gate)


def _better_of_both(site: Site, checkpoint: Path, shape: Shape, folder: Path, leave_out: LeaveOut) -> Path:
    """Export an INT8 finalist calibrated and trained in INT8; what keeps the gate, then the more accurate, is taken."""

    def calibrated(place: Path) -> Path:
        return _export(site, checkpoint, place, "int8")

    def trained(place: Path) -> Path:
        return _export(site, _train_in_int8(site, checkpoint, shape), place, "int8", reference=checkpoint)

    made: list[Path] = []
    for name, way in (("calibrated", calibrated), ("trained in INT8", trained)):
        try:
            made.append(way(folder.with_name(f"int8-{way.__name__}")))
        except (ExportError, TrainingError) as exc:
            leave_out(f"{shape.name} int8 (full, {name})", exc)
    if not made:
        raise ExportError("it can neither be calibrated nor trained in INT8")
    return _take(site, _better(site, made), folder)


def _better(site: Site, made: Sequence[Path]) -> Path:
    """Return what keeps the gate, then the more accurate one; of equals the calibrated one, which comes first."""
    return max(made, key=lambda model: (not failures(site, model), accuracy_of(model).top1))


def _take(site: Site, model: Path, folder: Path) -> Path:
    site.say(f"taken: {model.parent.relative_to(site.out)}")
    return copy_artifact(model, folder)


def choose_again(site: Site) -> None:
    """Take the other one of calibration and training in INT8 where another gate wants it; forget its latency."""
    for folder in sorted((site.out / "full").glob("*/int8")):
        model = folder / target_of(site.target).model_name
        ways = [folder.with_name(f"int8-{way}") / model.name for way in ("calibrated", "trained")]
        if not (model.is_file() and all(way.is_file() for way in ways)):
            continue
        better = _better(site, ways)
        if read_manifest(better) != read_manifest(model):
            _take(site, better, folder)
            folder.with_suffix(".json").unlink(missing_ok=True)


def _export(
    site: Site,
    checkpoint: Path,
    folder: Path,
    precision: Precision,
    *,
    max_int8_drop: float | None = None,
    reference: Path | None = None,
) -> Path:
    """Export a checkpoint into a folder, unless it was before, and return the model file.

    No gate is kept here: a candidate that lost too much is a result too, see `failures`.
    """
    model = folder / target_of(site.target).model_name
    if model.is_file():
        return model
    training = site.training
    site.say(f"export: {folder.relative_to(site.out)}")
    quantization = QuantizationConfig()
    if precision == "int8" and reference is None:
        quantization = replace(training.quantization, max_int8_drop=max_int8_drop)
    return export_checkpoint(
        checkpoint,
        folder,
        to=site.target,
        precision=precision,
        calibration=site.data,
        config=ExportConfig(generated_golden=training.generated_golden),
        quantization=quantization,
        gate=None,
        reference=reference,
    )


def _train_in_int8(site: Site, checkpoint: Path, shape: Shape) -> Path:
    """Train a finalist on as the target's INT8 graph; return that checkpoint."""
    return qat(
        checkpoint,
        site.data,
        site.out / "full" / shape.name / "qat",
        site.training.in_int8(shape.size),
        to=site.target,
        teacher_path=site.teacher,
        distillation=site.training.distillation,
        teacher_cache=site.teacher_cache,
        quantization=site.training.quantization,
        hardware=site.hardware,
    )
