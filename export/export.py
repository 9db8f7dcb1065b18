"""Checkpoint → artifact: ONNX, then what the target needs, then the package.

edgefg export runs/x/student.safetensors --to openvino --precision int8 --calibration DATA --out runs/x/int8
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from torch import nn

from edgefg import __version__
from edgefg.artifact.golden import FloatArray
from edgefg.artifact.hashes import sha256
from edgefg.artifact.manifest import Provenance
from edgefg.classifier import Classifier
from edgefg.data import ImageDataset, load_dataset
from edgefg.data.calibration import Calibration, batches, choose_balanced, read_calibration, synthetic_frames
from edgefg.errors import DataError, ExportError
from edgefg.evaluation.measure import Measured, measure
from edgefg.evaluation.package import Draft, check_target, golden_frames, write_artifact
from edgefg.export.onnx.fp16 import to_half
from edgefg.export.qat.quantized_graph import write_quantized
from edgefg.export.qat.quantized_network import QuantizedNetwork, open_quantized
from edgefg.export.quantize.calibrators import CALIBRATORS, Calibrator
from edgefg.export.quantize.mixed_precision import find_kept
from edgefg.export.quantize.quantizer import SEVEN_BITS, Quantizer, needs_seven_bits, saturates
from edgefg.export.targets.emit import emit
from edgefg.export.tracing.onnx_exporter import check_parity, need_one_graph, torch_logits, write_onnx
from edgefg.image_io import read_image
from edgefg.preprocess import InputSpec, UInt8Array, prepare
from edgefg.settings.gate import Gate
from edgefg.training.checkpoint import Header, Target, load, read_header
from edgefg.training.models.network import Network

Precision = Literal["fp32", "fp16", "int8"]
TARGETS: tuple[Target, ...] = ("openvino", "onnx", "tensorrt-onnx")
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")
_NAMES = {"openvino": "OpenVINO", "onnx": "ONNX Runtime", "tensorrt-onnx": "TensorRT"}
# Floating point needs no more photographs than a golden set holds.
_GOLDEN_CANDIDATES = 16
_GATE = Gate()


class _Job(msgspec.Struct, frozen=True, eq=False, kw_only=True):
    """One export, between its steps."""

    to: Target
    precision: Precision
    batch: int
    calibrator: Calibrator
    any_cpu: bool
    bias_correction: bool
    calibration: Calibration | None
    keep: tuple[str, ...] = ()
    """Layers that INT8 leaves in floating point."""
    say: Callable[[str], None]

    def quantizer(self, source: Path) -> Quantizer:
        """Return what quantises this export's FP32 graph."""
        assert self.calibration is not None
        return Quantizer(
            self.to, source, self.calibration.inputs, batch=self.batch, calibrator=self.calibrator,
            any_cpu=self.any_cpu, bias_correction=self.bias_correction,
        )  # fmt: skip


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    to: Target,
    precision: Precision,
    calibration: Path | ImageDataset | None = None,
    images: int = 300,
    batch: int = 1,
    calibrator: Calibrator = "minmax",
    any_cpu: bool | None = None,
    bias_correction: bool = False,
    keep_within: float | None = None,
    seed: int = 0,
    skip_corrupt: bool = False,
    gate: Gate | None = _GATE,
    reference: Path | None = None,
    generated_golden: bool = False,
    fit_temperature: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Export a checkpoint to a complete artifact, checked on this machine; return the path of its model file.

    Args:
        checkpoint: ``.safetensors`` of a teacher, a student or a pruned student, or of a quantised network, which is
            exported in INT8, for the target that it was trained for, without calibration.
        out: folder for the artifact; an earlier artifact in it is replaced, and stays where this export fails.
        to: ``openvino`` (``model.xml``), ``onnx`` for ONNX Runtime, ``tensorrt-onnx`` for a TensorRT build on a
            device (both ``model.onnx``).
        precision: ``fp32``, ``int8``, or, for TensorRT and OpenVINO's GPUs, ``fp16``.
        calibration: the data set that the checkpoint was trained on; its training split calibrates INT8 and gives the
            golden frames, its validation split the accuracy in the manifest, the comparison with the checkpoint, and
            the temperature. Already checked data may be given as they are. Without it an export gets synthetic golden
            frames, and INT8 is refused, but for a quantised network.
        images: how many images calibrate, balanced by class.
        batch: fixed batch size of the network; 0 leaves it free.
        calibrator: how activation ranges are found, see `edgefg.export.quantize.calibrators`.
        any_cpu: INT8 with 7-bit weights, exact also on x86 CPUs without VNNI; less exact than 8 bits on all others.
            Where left out they are taken if this CPU is such a one, see
            `edgefg.export.quantize.quantizer.needs_seven_bits`.
        bias_correction: correct the biases of an INT8 network, see `edgefg.export.quantize.bias_correction`; for
            OpenVINO, whose biases are always corrected, by NNCF's slower and more exact way.
        keep_within: how many points of top-1 INT8 may lose against FP32 on the validation split. What hurts most stays
            in floating point until it loses no more, see `edgefg.export.quantize.mixed_precision`; None keeps nothing.
        seed: chooses the images.
        skip_corrupt: leave unreadable images out instead of raising.
        gate: how much worse than the checkpoint's own network the artifact may be on validation data; None compares
            all the same, and refuses nothing.
        reference: of a quantised checkpoint: the FP32 one that it was trained from, with which it is compared instead
            of with itself.
        generated_golden: make the golden set of generated frames, so that no photograph goes with the artifact, rather
            than of training images.
        fit_temperature: fit `OutputSpec.temperature` to the artifact's logits on validation data
            (`edgefg.evaluation.temperature`); without, it stays 1.
        progress: called with one line before each step.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        DataError: the calibration data are missing or are not the checkpoint's.
        GateError: the artifact does not pass the gate; it is not there, and an earlier one stays.
        ExportError: a step failed; nothing half-written is left.
    """
    _check_options(to, precision, batch, calibrator, any_cpu, keep_within)
    check_target(out)
    found = read_header(checkpoint)
    trained = found.quantized is not None
    calibrates = precision == "int8" and not trained
    if not calibrates:
        _need_nothing_idle(precision, calibrator, any_cpu, bias_correction, keep_within)
    compared = None if reference is None else _fp32_of(found, reference, calibration)
    if calibrates and calibration is None:
        raise DataError("INT8 needs --calibration DATA: the data set that the checkpoint was trained on")
    say = progress or (lambda _: None)
    say(f"reading {checkpoint}")
    network: Network | QuantizedNetwork
    network, header = open_quantized(checkpoint, to, precision, any_cpu=any_cpu) if trained else load(checkpoint)
    if isinstance(network, Network):
        need_one_graph(network, header, checkpoint, "export")
    if isinstance(calibration, Path):
        say(f"checking {calibration}")
    data = None if calibration is None else load_dataset(calibration, expected=header, skip_corrupt=skip_corrupt)
    calibrating, photographs = _read_data(header, data, calibrates, images, seed, say)
    frames = _golden_candidates(header.input, () if generated_golden else photographs)
    golden = golden_frames(frames, header.input, len(header.labels))
    inputs = np.stack([prepare(frame, header.input) for frame in golden])
    seven_bits = calibrates and needs_seven_bits(to, any_cpu)
    if seven_bits and any_cpu is None:
        say(SEVEN_BITS)
    if to == "openvino" and precision == "int8" and saturates() and not (seven_bits or _has_seven_bits(header)):
        say("this CPU has no VNNI and saturates with the 8-bit weights: what is measured here is not what others see")
    job = _Job(
        to=to, precision=precision, batch=batch, calibrator=calibrator, any_cpu=seven_bits,
        bias_correction=bias_correction, calibration=calibrating, say=say,
    )  # fmt: skip
    if keep_within is not None and data is not None:
        job = msgspec.structs.replace(job, keep=_search_kept(job, network, header, data, keep_within))
    draft = Draft(
        labels=header.labels,
        taxonomy=header.taxonomy,
        input=header.input,
        precision=precision,
        provenance=_provenance(checkpoint, header, job),
        frames=golden,
        parent_logits=torch_logits(network, inputs),
    )
    if trained and compared is None and data is not None:
        say("it is compared with the quantised checkpoint itself; --reference takes the FP32 one that it was")
    measuring = _measure(data, compared or network, header.input, gate, fit_temperature, say)
    return write_artifact(out, draft, lambda folder: _write_model(job, network, draft, inputs, folder), measuring)


def _check_options(
    to: Target,
    precision: Precision,
    batch: int,
    calibrator: Calibrator,
    any_cpu: bool | None,
    keep_within: float | None,
) -> None:
    """Raise where options are out of range, before any work is done."""
    if to not in TARGETS or precision not in PRECISIONS or batch < 0:
        raise ExportError(
            f"cannot export {precision!r} at batch {batch} to {to!r}; needed {' or '.join(PRECISIONS)}, a batch of 0"
            f" (free) or more, and one of {', '.join(TARGETS)}"
        )
    if any_cpu and to == "tensorrt-onnx":
        raise ExportError("7-bit weights are for CPUs; leave out --any-cpu for tensorrt-onnx")
    if precision == "fp16" and to == "onnx":
        raise ExportError(
            "FP16 was asked for onnx, which ONNX Runtime computes in FP32 on a CPU; it is there for tensorrt-onnx and"
            " openvino: export fp32 or int8"
        )
    if calibrator not in CALIBRATORS:
        raise ExportError(f"there is no calibrator {calibrator!r}; needed one of {', '.join(CALIBRATORS)}")
    if keep_within is not None and not keep_within >= 0:
        raise ExportError(f"--keep-within is {keep_within:g} points; needed 0 or more")


def _need_nothing_idle(
    precision: Precision, calibrator: Calibrator, any_cpu: bool | None, bias_correction: bool, keep_within: float | None
) -> None:
    """Raise where an option was given that changes nothing in an export that does not calibrate."""
    idle = {
        "--calibrator": calibrator != "minmax",
        "--bias-correction": bias_correction,
        "--keep-within": keep_within is not None,
        "--any-cpu": any_cpu is not None and precision != "int8",
    }
    if given := [name for name, is_given in idle.items() if is_given]:
        raise ExportError(f"{given[0]} changes nothing here; needed --precision int8 of an FP32 checkpoint")


def _has_seven_bits(header: Header) -> bool:
    return header.quantized is not None and header.quantized.any_cpu


def _fp32_of(header: Header, reference: Path, data: object) -> Network:
    """Load the FP32 network that a quantised one was trained from. Raises `DataError` where it is another."""
    if data is None:
        raise DataError("--reference changes nothing without data to compare on; needed --calibration DATA")
    if header.quantized is None or header.parent != sha256(reference):
        raise DataError(
            f"--reference {reference} is not what this checkpoint was quantised from; needed the file that was given to"
            " `edgefg qat`, and only with what that wrote"
        )
    return load(reference)[0]


def _search_kept(
    job: _Job, network: nn.Module, header: Header, data: ImageDataset, keep_within: float
) -> tuple[str, ...]:
    """Search the layers to keep, on a graph of its own, since what is kept is stated beside the file to be written."""
    if not data.splits["val"]:
        raise DataError(f"{data.root} has no validation images; needed some to measure what INT8 loses")
    with tempfile.TemporaryDirectory(prefix="edgefg-") as scratch:
        source = Path(scratch) / "model.onnx"
        job.say("exporting to ONNX, to search what INT8 hurts")
        write_onnx(network, header.input, source, batch=job.batch)
        samples = data.splits["val"]
        return find_kept(job.quantizer(source), samples, header.input, keep_within, batch=job.batch, say=job.say)


def _read_data(
    header: Header,
    data: ImageDataset | None,
    calibrates: bool,
    images: int,
    seed: int,
    say: Callable[[str], None],
) -> tuple[Calibration | None, Sequence[Path]]:
    """Return what calibrates, None where nothing is calibrated, and the photographs that were chosen, if any."""
    if data is None:
        return None, ()
    count = images if calibrates else _GOLDEN_CANDIDATES
    paths = choose_balanced(data.splits["train"], count, seed, data.conditions)
    if not calibrates:
        return None, paths
    say(f"reading {len(paths)} calibration images")
    return read_calibration(paths, header.input), paths


def _golden_candidates(spec: InputSpec, photographs: Sequence[Path]) -> list[UInt8Array]:
    """Return frames for the golden set: photographs, or generated ones where there are none."""
    return [read_image(path) for path in photographs[:_GOLDEN_CANDIDATES]] or synthetic_frames(spec)


def _measure(
    data: ImageDataset | None,
    network: nn.Module,
    spec: InputSpec,
    gate: Gate | None,
    fit_temperature: bool,
    say: Callable[[str], None],
) -> Callable[[Classifier], Measured] | None:
    """Return what measures an artifact beside its network on validation data; ``test`` is for reporting alone."""
    if data is None or not data.splits["val"]:
        why = "no data were given" if data is None else "there are no validation images"
        say(f"{why}: nothing is compared with the checkpoint, and the temperature stays 1")
        return None
    samples, name = data.splits["val"], f"val of {data.root.resolve().name}"

    def parent(frames: list[UInt8Array]) -> FloatArray:
        return torch_logits(network, np.stack([prepare(frame, spec) for frame in frames]))

    def measuring(classifier: Classifier) -> Measured:
        say(f"comparing with the checkpoint on {len(samples)} images")
        return measure(classifier, samples, name, parent=parent, gate=gate, fit_temperature=fit_temperature)

    return measuring


def _write_model(job: _Job, network: nn.Module, draft: Draft, inputs: UInt8Array, folder: Path) -> Path:
    """Write the model file of one artifact into ``folder``; what lies between goes elsewhere and is removed."""
    if isinstance(network, QuantizedNetwork):
        return write_quantized(network, draft.input, job.to, folder, inputs, batch=job.batch, say=job.say)
    with tempfile.TemporaryDirectory(prefix="edgefg-") as scratch:
        source = Path(scratch) / "model.onnx"
        job.say("exporting to ONNX")
        write_onnx(network, draft.input, source, batch=job.batch)
        check_parity(network, source, inputs)
        if job.calibration is not None:
            job.say(f"quantising for {_NAMES[job.to]}")
            quantizer = job.quantizer(source)
            model = quantizer.write(folder, job.keep)
            if quantizer.remark:
                job.say(quantizer.remark)
            return model
        if job.precision == "fp16":
            half = Path(scratch) / "half.onnx"
            to_half(source, half, batches(inputs, job.batch or 1))
            source = half
        if job.to == "openvino":
            job.say("converting to OpenVINO")
        return emit(source, job.to, folder)


def _provenance(checkpoint: Path, header: Header, job: _Job) -> Provenance:
    stages = [
        f"{header.kind} {header.backbone} ({header.method}): {header.recipe}",
        f"export: batch {job.batch or 'free'}",
    ]
    calibration = job.calibration
    if calibration is not None:
        how = [f"{len(calibration.inputs)} images", job.calibrator]
        how += ["any CPU"] if job.any_cpu else []
        how += ["biases corrected"] if job.bias_correction else []
        how += [f"in floating point: {' '.join(job.keep)}"] if job.keep else []
        stages.append(f"int8: {', '.join(how)}")
    return Provenance(
        edgefg=__version__,
        parent=sha256(checkpoint),
        teacher=header.teacher,
        dataset=header.dataset,
        split=header.split,
        calibration=None if calibration is None else calibration.fingerprint,
        recipe="; ".join(stages),
    )
