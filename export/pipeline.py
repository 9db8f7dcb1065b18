"""The pipeline: train, distil, prune, export and verify in this order.

A stage whose result exists is skipped; an unfinished one resumes. `edgefg pipeline` and `make demo` run it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import msgspec

from edgefg.artifact.hashes import sha256
from edgefg.artifact.manifest import check_artifact, read_manifest
from edgefg.data import ImageDataset, load_dataset
from edgefg.data.csv_manifest import write_csv
from edgefg.data.cub import is_cub
from edgefg.data.public import public_root
from edgefg.data.split import SPLITS
from edgefg.errors import DataError, EdgefgError
from edgefg.evaluation.verify import VerifyReport, verify
from edgefg.export.distill.distill import distill
from edgefg.export.export import export_checkpoint
from edgefg.export.prune.prune import ROUNDS, prune
from edgefg.export.targets import target_of
from edgefg.files import write_json
from edgefg.log import get_logger
from edgefg.settings.gate import Gate
from edgefg.settings.hardware import Hardware
from edgefg.settings.pruning import PruningConfig
from edgefg.settings.quantization import Precision, QuantizationConfig, TargetName
from edgefg.settings.split import SplitSpec
from edgefg.settings.training import TrainingConfig
from edgefg.training.teacher import train_teacher

_KINDS = ("teacher", "student", "pruned")
# Data without split folders, as folders of links; not "data", where `make demo` keeps the real ones.
_LINKS = "split"
_log = get_logger(__name__)
_GATE = Gate()


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Inputs and settings that determine a pipeline's files; written beside them as ``pipeline.json``."""

    data: str
    backbone: str
    weights: str
    student: str
    student_weights: str
    teacher_config: TrainingConfig
    student_config: TrainingConfig
    prune_config: TrainingConfig
    macs: float
    calibration_images: int = 300
    split: SplitSpec = SplitSpec()


class Artifact(NamedTuple):
    """An artifact that the pipeline exports."""

    folder: str
    source: str
    to: TargetName
    precision: Precision
    parent: str | None = None
    """Folder of the artifact that it is compared with. None: it is not compared."""
    row: str = ""
    """Name of its row in the final table; empty if it has none."""


# Every parent comes before what is compared with it; the table's rows are in this order.
ARTIFACTS = (
    Artifact("teacher-openvino-fp32", "teacher", "openvino", "fp32", row="teacher FP32"),
    Artifact("student-openvino-fp32", "student", "openvino", "fp32", row="student FP32"),
    Artifact("openvino-fp32", "pruned", "openvino", "fp32", row="student pruned FP32"),
    Artifact("onnx-fp32", "pruned", "onnx", "fp32", "openvino-fp32"),
    Artifact("onnx-int8", "pruned", "onnx", "int8", "openvino-fp32"),
    Artifact("tensorrt-onnx-int8", "pruned", "tensorrt-onnx", "int8", "openvino-fp32"),
    Artifact("openvino-int8", "pruned", "openvino", "int8", "openvino-fp32", row="student pruned INT8"),
)


class PipelineResult(NamedTuple):
    """Results of a pipeline."""

    data: Path
    """Path of data with splits: the given data, or the links or CSV manifest below ``out``."""
    split: str
    """Split for the final table: ``test``, or ``val`` if there is no test split."""
    reports: list[tuple[Artifact, VerifyReport]]
    table: list[tuple[str, Path]]
    """Name and model file of each row of the final table."""
    image: Path
    """One image of that split."""


def run(
    plan: Plan,
    out: Path,
    *,
    hardware: Hardware | None = None,
    gate: Gate = _GATE,
    skip_corrupt: bool = False,
    restart: bool = False,
) -> PipelineResult:
    """Run or resume all stages in the folder ``out``.

    Args:
        plan: inputs and settings.
        out: folder for all files.
        hardware: device and precision of the training.
        gate: limits of an artifact's loss on ``val``, against its checkpoint and against the FP32 artifact.
        skip_corrupt: leave unreadable images out.
        restart: delete the checkpoints of an earlier run and train again.

    Raises:
        DataError: ``out`` holds files of another plan, or a stage raises it.
        GateError: an artifact exceeds the limits of ``gate``.
        ParityError: an artifact does not reproduce its golden set.
    """
    _claim(plan, out, restart)
    data = _split_folders(Path(plan.data), out, plan.split, skip_corrupt)
    teacher, student, pruned = (out / f"{kind}.safetensors" for kind in _KINDS)
    if not teacher.exists():
        _log.info("teacher: %s, %d epochs", plan.backbone, plan.teacher_config.schedule.epochs)
        train_teacher(
            data, out, plan.teacher_config, backbone=plan.backbone, weights=plan.weights, split=plan.split,
            hardware=hardware, skip_corrupt=skip_corrupt,
        )  # fmt: skip
    if not student.exists():
        _log.info("student: %s distilled, %d epochs", plan.student, plan.student_config.schedule.epochs)
        distill(
            teacher, data, out, plan.student_config, student=plan.student, weights=plan.student_weights,
            hardware=hardware, skip_corrupt=skip_corrupt,
        )  # fmt: skip
    if not pruned.exists():
        epochs = plan.prune_config.schedule.epochs
        _log.info("pruned student: %.0f%% of the multiply-accumulates, %d epochs", 100 * plan.macs, epochs)
        prune(
            student, data, out, plan.prune_config, PruningConfig(macs=plan.macs), teacher_path=teacher,
            hardware=hardware, skip_corrupt=skip_corrupt,
        )  # fmt: skip
    checked = load_dataset(data, plan.split, skip_corrupt=skip_corrupt)
    reports = [(artifact, _export(artifact, out, checked, plan, gate)) for artifact in ARTIFACTS]
    rows = [(artifact.row, _model_file(artifact, out)) for artifact in ARTIFACTS if artifact.row]
    split = "test" if checked.splits["test"] else "val"
    return PipelineResult(data, split, reports, rows, checked.splits[split][0].path)


def _model_file(artifact: Artifact, out: Path) -> Path:
    return out / artifact.folder / target_of(artifact.to).model_name


def _export(
    artifact: Artifact,
    out: Path,
    data: ImageDataset,
    plan: Plan,
    gate: Gate,
) -> VerifyReport:
    """Export an artifact, unless an earlier export of this checkpoint is intact, and verify it."""
    checkpoint = out / f"{artifact.source}.safetensors"
    model = _model_file(artifact, out)
    if not _is_current(model, checkpoint):
        _log.info("export: %s", artifact.folder)
        export_checkpoint(
            checkpoint,
            out / artifact.folder,
            to=artifact.to,
            precision=artifact.precision,
            calibration=data,
            quantization=QuantizationConfig(num_samples=plan.calibration_images)
            if artifact.precision == "int8"
            else QuantizationConfig(),
            gate=gate,
        )
    if artifact.parent is None:
        return verify(model)
    parent = next(_model_file(other, out) for other in ARTIFACTS if other.folder == artifact.parent)
    return verify(model, parent=parent, data=data.splits["val"], split="val", gate=gate)


def _is_current(model: Path, checkpoint: Path) -> bool:
    try:
        manifest = read_manifest(model)
        check_artifact(manifest, model)
        return manifest.provenance.parent == sha256(checkpoint)
    except EdgefgError:
        return False


def _claim(plan: Plan, out: Path, restart: bool) -> None:
    """Write the plan into the folder. Raise `DataError` if the folder holds files of another plan."""
    path = out / "pipeline.json"
    if path.exists() and not restart:
        try:
            earlier = msgspec.json.decode(path.read_bytes(), type=Plan)
        except msgspec.DecodeError as exc:
            raise DataError(f"{path} is not a pipeline's plan ({exc}); give another --out, or --restart") from exc
        if earlier != plan:
            names = [field.name for field in msgspec.structs.fields(Plan)]
            changed = [name for name in names if getattr(earlier, name) != getattr(plan, name)]
            raise DataError(
                f"{out} holds a pipeline with another {', '.join(changed)}; give another --out, or --restart to redo it"
            )
        return
    leftovers = [out / f"{kind}{suffix}" for kind in _KINDS for suffix in (".safetensors", ".resume.safetensors")]
    if not restart and (strangers := [path.name for path in leftovers if path.exists()]):
        raise DataError(
            f"{out} holds {strangers[0]}, which no pipeline made; give another --out, or --restart to redo it"
        )
    for leftover in leftovers:
        leftover.unlink(missing_ok=True)
    try:
        for folder in (out / _LINKS, out / ROUNDS):
            if folder.is_dir():
                shutil.rmtree(folder)
        write_json(path, plan)
    except OSError as exc:
        raise DataError(f"cannot write below {out}: {exc.strerror}") from exc


def _split_folders(data: Path, out: Path, split: SplitSpec, skip_corrupt: bool) -> Path:
    """Return the path of data with splits. Class folders become folders of links, public data a CSV manifest."""
    if public_root(data) is not None:  # which `bench` does not read
        manifest = out / _LINKS / "data.csv"
        if not manifest.is_file():
            found = load_dataset(data, split, skip_corrupt=skip_corrupt)
            write_csv(manifest, found.splits, found.labels, found.groups, found.taxonomy, found.conditions)
        return manifest
    if not data.is_dir() or is_cub(data) or (data / "train").is_dir():
        return data
    target = out / _LINKS
    if target.is_dir():
        return target
    loaded = load_dataset(data, split, skip_corrupt=skip_corrupt)
    partial = out / f".{_LINKS}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    for name in SPLITS:
        for path, _ in loaded.splits[name]:
            link = partial / name / path.relative_to(data)
            link.parent.mkdir(parents=True, exist_ok=True)
            try:
                link.symlink_to(path.resolve())
            except OSError:  # no right to make links, as on Windows
                shutil.copy2(path, link)
    if (data / "taxonomy.csv").is_file():
        shutil.copy2(data / "taxonomy.csv", partial)
    partial.replace(target)
    return target
