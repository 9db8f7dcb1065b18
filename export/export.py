"""Checkpoint → artifact: ONNX, then what the target needs, then the package.

edgefg export runs/x/student.safetensors --to openvino --precision int8 --calibration DATA --out runs/x/int8
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from torch import nn

from edgefg import __version__
from edgefg.classifier import Classifier
from edgefg.errors import DataError, ExportError
from edgefg.export.calibration import Calibration, batches, choose_balanced, read_calibration, synthetic_frames
from edgefg.export.half import to_half
from edgefg.export.package import Draft, check_target, golden_frames, write_artifact
from edgefg.export.quantize import Calibrator, quantize_onnxruntime, quantize_openvino, quantize_tensorrt
from edgefg.export.quantized_graph import write_quantized
from edgefg.export.quantized_network import QuantizedNetwork, open_quantized
from edgefg.export.to_onnx import check_parity, torch_logits, write_onnx
from edgefg.export.to_openvino import convert, write_ir
from edgefg.export.verify import measure
from edgefg.manifest import Accuracy, Provenance, sha256
from edgefg.preprocess import UInt8Array, prepare
from edgefg.sources import read_image
from edgefg.training.checkpoint import Header, Target, load, read_header
from edgefg.training.data import FolderData, load_data
from edgefg.training.models.network import Network

Precision = Literal["fp32", "fp16", "int8"]
TARGETS: tuple[Target, ...] = ("openvino", "onnx", "tensorrt-onnx")
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")
# Floating point needs no more photographs than a golden set holds.
_GOLDEN_CANDIDATES = 16


class _Job(msgspec.Struct, frozen=True, eq=False, kw_only=True):
    """One export, between its steps."""

    to: Target
    precision: Precision
    batch: int
    calibrator: Calibrator
    any_cpu: bool
    calibration: Calibration | None
    say: Callable[[str], None]


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    to: Target,
    precision: Precision,
    calibration: Path | FolderData | None = None,
    images: int = 300,
    batch: int = 1,
    calibrator: Calibrator = "minmax",
    any_cpu: bool = False,
    seed: int = 0,
    skip_corrupt: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Export a checkpoint to a complete artifact, checked on this machine; return the path of its model file.

    Args:
        checkpoint: ``.safetensors`` of a teacher, a student or a pruned student, or of a quantised network, which is
            exported in INT8, for the target that it was trained for, without calibration.
        out: folder for the artifact; an earlier artifact in it is replaced, and stays where this export fails.
        to: ``openvino`` (``model.xml``), ``onnx`` for ONNX Runtime, ``tensorrt-onnx`` for a TensorRT build on a
            device (both ``model.onnx``).
        precision: ``fp32``, ``int8``, or, for TensorRT alone, ``fp16``.
        calibration: the data set that the checkpoint was trained on; its training split calibrates INT8 and gives the
            golden frames, its validation split the accuracy in the manifest. Already checked data may be given as they
            are. Without it an export gets synthetic golden frames, and INT8 is refused, but for a quantised network.
        images: how many images calibrate, balanced by class.
        batch: fixed batch size of the network; 0 leaves it free.
        calibrator: how activation ranges are found, see `edgefg.export.quantize`.
        any_cpu: INT8 with 7-bit weights, exact also on x86 CPUs without VNNI; less exact than 8 bits on all others.
        seed: chooses the images.
        skip_corrupt: leave unreadable images out instead of raising.
        progress: called with one line before each step.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        DataError: the calibration data are missing or are not the checkpoint's.
        ExportError: a step failed; nothing half-written is left.
    """
    if to not in TARGETS or precision not in PRECISIONS or batch < 0:
        raise ExportError(
            f"cannot export {precision!r} at batch {batch} to {to!r}; needed {' or '.join(PRECISIONS)}, a batch of 0"
            f" (free) or more, and one of {', '.join(TARGETS)}"
        )
    if precision == "fp16" and to != "tensorrt-onnx":
        raise ExportError(f"FP16 was asked for {to}; it is there for tensorrt-onnx alone: export fp32 or int8")
    trained = read_header(checkpoint).quantized is not None
    calibrates = precision == "int8" and not trained
    if calibrates and calibration is None:
        raise DataError("INT8 needs --calibration DATA: the data set that the checkpoint was trained on")
    check_target(out)
    say = progress or (lambda _: None)
    say(f"reading {checkpoint}")
    network: Network | QuantizedNetwork
    network, header = open_quantized(checkpoint, to, precision, any_cpu=any_cpu) if trained else load(checkpoint)
    if isinstance(network, Network) and not network.single_pass:
        raise ExportError(
            f"{checkpoint} is a {header.method} teacher, which looks at an image several times and so is no single"
            " graph; distil it with `edgefg distill` and export the student"
        )
    data = calibration
    if isinstance(data, Path):
        say(f"checking {data}")
        data = load_data(data, header.split, skip_corrupt=skip_corrupt, like=header)
    if data is not None and data.labels != header.labels:
        raise DataError(f"{data.root} does not have the classes of {checkpoint}; needed the data it was trained on")
    calibrating, frames = _read_data(header, data, calibrates, images, seed, say)
    golden = golden_frames(frames, header.input, len(header.labels))
    inputs = np.stack([prepare(frame, header.input) for frame in golden])
    draft = Draft(
        labels=header.labels,
        taxonomy=header.taxonomy,
        input=header.input,
        precision=precision,
        provenance=_provenance(checkpoint, header, calibrating, calibrator, batch, any_cpu),
        frames=golden,
        parent_logits=torch_logits(network, inputs),
    )
    job = _Job(
        to=to,
        precision=precision,
        batch=batch,
        calibrator=calibrator,
        any_cpu=any_cpu,
        calibration=calibrating,
        say=say,
    )
    return write_artifact(out, draft, lambda folder: _write_model(job, network, draft, inputs, folder), _measure(data))


def _read_data(
    header: Header,
    data: FolderData | None,
    calibrates: bool,
    images: int,
    seed: int,
    say: Callable[[str], None],
) -> tuple[Calibration | None, list[UInt8Array]]:
    """Return what calibrates, None where nothing is calibrated, and photographs for the golden set."""
    if data is None:
        return None, synthetic_frames(header.input)
    count = images if calibrates else _GOLDEN_CANDIDATES
    paths = choose_balanced(data.splits["train"], count, seed)
    frames = [read_image(path) for path in paths[:_GOLDEN_CANDIDATES]]
    if not calibrates:
        return None, frames
    say(f"reading {len(paths)} calibration images")
    return read_calibration(paths, header.input), frames


def _measure(data: FolderData | None) -> Callable[[Classifier], Accuracy] | None:
    """Return what measures the accuracy for the manifest: on validation data, since ``test`` is for reporting alone."""
    if data is None or not data.splits["val"]:
        return None
    samples = data.splits["val"]
    return lambda classifier: measure(classifier, samples, f"val of {data.root.resolve().name}")


def _write_model(job: _Job, network: nn.Module, draft: Draft, inputs: UInt8Array, folder: Path) -> Path:
    """Write the model file of one artifact into ``folder``; what lies between goes elsewhere and is removed."""
    if isinstance(network, QuantizedNetwork):
        return write_quantized(network, draft.input, job.to, folder, inputs, batch=job.batch, say=job.say)
    with tempfile.TemporaryDirectory(prefix="edgefg-") as scratch:
        source = Path(scratch) / "model.onnx"
        job.say("exporting to ONNX")
        write_onnx(network, draft.input, source, batch=job.batch)
        check_parity(network, source, inputs)
        if job.to == "openvino":
            return _write_openvino(job, source, folder / "model.xml")
        target = folder / "model.onnx"
        if job.precision == "fp16":
            to_half(source, target, batches(inputs, job.batch or 1))
            return target
        if job.calibration is None:
            target.write_bytes(source.read_bytes())
            return target
        job.say(f"quantising for {'ONNX Runtime' if job.to == 'onnx' else 'TensorRT'}")
        data, batch, calibrator = job.calibration.inputs, job.batch, job.calibrator
        if job.to == "onnx":
            quantize_onnxruntime(source, target, data, batch=batch, calibrator=calibrator, any_cpu=job.any_cpu)
        else:
            why_not = quantize_tensorrt(source, target, data, batch=batch, calibrator=calibrator)
            job.say(f"what stays floating point is {f'FP32: {why_not}' if why_not else 'FP16'}")
        return target


def _write_openvino(job: _Job, source: Path, target: Path) -> Path:
    job.say("converting to OpenVINO")
    model = convert(source)
    if job.calibration is not None:
        job.say("quantising for OpenVINO")
        model = quantize_openvino(
            model, job.calibration.inputs, batch=job.batch, calibrator=job.calibrator, any_cpu=job.any_cpu
        )
    write_ir(model, target)
    return target


def _provenance(
    checkpoint: Path,
    header: Header,
    calibration: Calibration | None,
    calibrator: Calibrator,
    batch: int,
    any_cpu: bool,
) -> Provenance:
    stages = [f"{header.kind} {header.backbone} ({header.method}): {header.recipe}", f"export: batch {batch or 'free'}"]
    if calibration is not None:
        stages.append(f"int8: {len(calibration.inputs)} images, {calibrator}{', any CPU' if any_cpu else ''}")
    return Provenance(
        edgefg=__version__,
        parent=sha256(checkpoint),
        teacher=header.teacher,
        dataset=header.dataset,
        split=header.split,
        calibration=None if calibration is None else calibration.fingerprint,
        recipe="; ".join(stages),
    )
