"""Assembly of an artifact: model file, manifest and golden set in one folder, complete or not written at all.

Everything is written to a hidden folder beside the final one, loaded and checked there through `Classifier`, synced and
renamed. Runs on devices: no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from edgefg.artifact import golden
from edgefg.artifact.folder import GOLDEN, as_export_error, check_target, folder_beside, swap, sync_all
from edgefg.artifact.golden import FloatArray, GoldenSet
from edgefg.artifact.hashes import file_info
from edgefg.artifact.manifest import (
    SCHEMA,
    GoldenInfo,
    Manifest,
    OutputSpec,
    PlanInfo,
    Provenance,
    RuntimeInfo,
    encode_manifest,
    manifest_path,
)
from edgefg.classifier import Classifier
from edgefg.errors import ExportError
from edgefg.evaluation.validation import Validation
from edgefg.preprocess import InputSpec, UInt8Array, prepare, resize
from edgefg.taxonomy import TaxonomyLevel

_MOST_FRAMES = 16
# Shares of the greatest logit. Engines of one kind sum in another order on another processor …
_FP32_GATE = 1e-4
_FP32_TOLERANCE = 2e-4
# … and where sums are rounded to 8 bits again and again, some values land one step away.
_INT8_TOLERANCE = 0.02
# FP16 keeps 11 bits; a network that strays further than this overflows or cancels somewhere.
_FP16_GATE = 0.05
_INT8_PARENT_MARGIN = 1.5


class Draft(msgspec.Struct, frozen=True, eq=False, kw_only=True):
    """The contents of the manifest and the golden set, apart from the model file."""

    labels: tuple[str, ...]
    input: InputSpec
    precision: Literal["fp32", "fp16", "int8", "unknown"]
    provenance: Provenance
    frames: tuple[UInt8Array, ...]
    """Golden frames, see `golden_frames`."""
    parent_logits: FloatArray
    """``float32 [K, classes]`` of the FP32 parent for the preprocessed frames."""
    taxonomy: tuple[TaxonomyLevel, ...] = ()
    output: OutputSpec = OutputSpec()
    weight_bits: Literal[7, 8] | None = None
    """Width of INT8 weights."""
    plan: PlanInfo | None = None
    """For TensorRT plans only."""


def golden_frames(frames: Sequence[UInt8Array], spec: InputSpec, classes: int) -> tuple[UInt8Array, ...]:
    """Choose golden frames, in order, at most 16 and 2 MB; photographs are reduced first.

    Reduced to a long side of one and a half times the network's, a frame still proves crop and resize.
    """
    longest = max(spec.height, spec.width) * 3 // 2
    reduced = []
    for frame in frames[:_MOST_FRAMES]:
        scale = longest / max(frame.shape[:2])
        if scale < 1:
            frame = resize(frame, max(1, round(frame.shape[0] * scale)), max(1, round(frame.shape[1] * scale)))
        reduced.append(frame)
    chosen = golden.choose_frames(reduced, spec, classes)
    if not chosen:
        raise ExportError(f"no frame fits a golden set of 2 MB at {spec.height}×{spec.width}; export a smaller input")
    return chosen


def write_artifact(
    out: Path,
    draft: Draft,
    write_model: Callable[[Path], Path],
    validate: Callable[[Classifier], Validation] | None = None,
) -> Path:
    """Write an artifact folder and return the path of its model file.

    Args:
        out: the folder. An earlier artifact there is replaced; a folder of anything else is refused.
        draft: the contents of the manifest.
        write_model: writes the model file, called ``model.…``, into the folder that it is given, and returns its path.
        validate: measures what goes into the manifest: accuracy, temperature, comparison with the parent. If it
            raises `GateError`, so does this function, and ``out`` does not change.

    Raises:
        GateError: see ``validate``.
        ExportError: ``out`` holds something else, the disk is full, or the written model does not load or does not
            reproduce its parent; ``out`` is as it was before.
    """
    check_target(out)
    with folder_beside(out) as temporary, as_export_error(out):
        model = stage(temporary, draft, write_model, validate)
        swap(temporary, out)
    return out / model.name


def stage(
    folder: Path,
    draft: Draft,
    write_model: Callable[[Path], Path],
    validate: Callable[[Classifier], Validation] | None = None,
) -> Path:
    """Write an artifact's files, proven and synced, into a folder of their own; return the path of the model file."""
    model = write_model(folder)
    _write_manifest(model, draft, validate)
    sync_all(folder)
    return model


def _write_manifest(model: Path, draft: Draft, validate: Callable[[Classifier], Validation] | None) -> None:
    """Write the manifest and, through a `Classifier` on the same files, the golden set; then check both."""
    manifest = Manifest(
        schema=SCHEMA,
        model=model.name,
        labels=draft.labels,
        input=draft.input,
        precision=draft.precision,
        weight_bits=draft.weight_bits,
        runtime=RuntimeInfo(name="unknown", version="unknown"),
        files=tuple(file_info(path) for path in sorted(model.parent.iterdir())),
        provenance=draft.provenance,
        taxonomy=draft.taxonomy,
        output=draft.output,
        plan=draft.plan,
    )
    manifest_path(model).write_bytes(encode_manifest(manifest))
    inputs = np.stack([prepare(frame, draft.input) for frame in draft.frames])
    with Classifier(model) as classifier:
        logits = np.stack([p.logits for p in classifier.predict_batch(list(inputs), color="rgb")])
        name, _, version = classifier.runtime_version.partition(" ")
        validation = validate(classifier) if validate is not None else None
    path = model.with_name(model.stem + GOLDEN)
    golden.write(GoldenSet(draft.frames, inputs, draft.parent_logits, logits), path)
    manifest = msgspec.structs.replace(
        manifest,
        runtime=RuntimeInfo(name=name, version=version),
        files=(*manifest.files, file_info(path)),
        golden=_tolerances(draft, logits, path.name),
    )
    if validation is not None:
        manifest = msgspec.structs.replace(
            manifest,
            output=msgspec.structs.replace(draft.output, temperature=validation.temperature),
            accuracy=validation.accuracy,
            temperature_scaling=validation.scaling,
            comparison=validation.comparison,
        )
    manifest_path(model).write_bytes(encode_manifest(manifest))
    with Classifier(model) as classifier:
        golden.check(classifier)


def _tolerances(draft: Draft, logits: FloatArray, file: str) -> GoldenInfo:
    """Set the tolerances. Raises `ExportError` if the artifact itself deviates too far from its parent."""
    if logits.shape != draft.parent_logits.shape or not np.isfinite(logits).all():
        raise ExportError("the exported network gives logits that are not finite; train or calibrate it again")
    largest = max(float(np.abs(draft.parent_logits).max()), 1e-6)
    deviation = float(np.abs(logits - draft.parent_logits).max())
    if draft.precision == "fp32":
        if deviation > _FP32_GATE * largest:
            raise ExportError(
                f"the FP32 artifact deviates from its parent by {deviation:.3g}, allowed are"
                f" {_FP32_GATE * largest:.3g}; the conversion changed the arithmetic, or the disk is full"
            )
        own = parent = _FP32_TOLERANCE * largest
    else:
        if draft.precision == "fp16" and deviation > _FP16_GATE * largest:
            raise ExportError(
                f"the FP16 artifact deviates from its parent by {deviation:.3g}, allowed are"
                f" {_FP16_GATE * largest:.3g}; this network needs FP32"
            )
        own = _INT8_TOLERANCE * largest
        parent = own + _INT8_PARENT_MARGIN * deviation
    return GoldenInfo(file=file, frames=len(draft.frames), logits=own, parent_logits=parent)
