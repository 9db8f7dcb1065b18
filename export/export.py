"""Checkpoint → artifact: ONNX, then what the target needs, then the package.

edgefg export runs/x/student.safetensors --to openvino --precision int8 --calibration DATA --out runs/x/int8
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import msgspec
import numpy as np
from msgspec.structs import replace
from torch import nn

from edgefg import __version__
from edgefg.artifact.folder import check_target
from edgefg.artifact.golden import FloatArray
from edgefg.artifact.hashes import sha256
from edgefg.artifact.manifest import Provenance
from edgefg.artifact.stages import ExportStage, encode_stages, versions_of
from edgefg.classifier import Classifier
from edgefg.data import ImageDataset, load_dataset
from edgefg.data.calibration import Calibration, batches, choose_balanced, read_calibration, synthetic_frames
from edgefg.errors import DataError, ExportError
from edgefg.evaluation.package import Draft, golden_frames, write_artifact
from edgefg.evaluation.validation import Validation, validate
from edgefg.export.qat.quantized_network import QuantizedNetwork, check_trained_for, load_quantized, write_quantized
from edgefg.export.quantize.mixed_precision import find_kept
from edgefg.export.quantize.quantizer import lacks_vnni
from edgefg.export.targets import target_of
from edgefg.export.targets.target import Target
from edgefg.export.tracing.onnx_exporter import check_parity, need_one_graph, torch_logits, write_onnx
from edgefg.image_io import read_image
from edgefg.log import get_logger
from edgefg.preprocess import InputSpec, UInt8Array, prepare
from edgefg.settings.export import ExportConfig
from edgefg.settings.gate import Gate
from edgefg.settings.options import options_of, with_options
from edgefg.settings.quantization import Precision, QuantizationConfig, TargetName, WeightBits
from edgefg.training.checkpoint import Header, load, read_header
from edgefg.training.models.network import Network

_log = get_logger(__name__)
# A golden set holds no more photographs than this.
_GOLDEN_CANDIDATES = 16
_CONFIG = ExportConfig()
_QUANTIZATION = QuantizationConfig()
_GATE = Gate()


class _Job(msgspec.Struct, frozen=True, eq=False, kw_only=True):
    """One export, between its steps."""

    checkpoint: Path
    header: Header
    target: Target
    precision: Precision
    config: ExportConfig
    quantization: QuantizationConfig
    weight_bits: WeightBits | None
    """Of INT8."""
    calibration: Calibration | None
    """None where nothing is calibrated."""


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    to: TargetName,
    precision: Precision,
    calibration: Path | ImageDataset | None = None,
    config: ExportConfig = _CONFIG,
    quantization: QuantizationConfig = _QUANTIZATION,
    gate: Gate | None = _GATE,
    reference: Path | None = None,
    skip_corrupt: bool = False,
) -> Path:
    """Export a checkpoint as a complete artifact, checked on this machine; return the path of its model file.

    Args:
        checkpoint: ``.safetensors`` of a teacher, a student, a pruned student, or a quantised network. A quantised
            network is exported in INT8, for the target that it was trained for, without calibration.
        out: folder for the artifact. An earlier artifact in it is replaced; it stays if this export fails.
        to: ``openvino`` (``model.xml``), ``onnx`` for ONNX Runtime, or ``tensorrt-onnx`` for a TensorRT build on a
            device (both ``model.onnx``).
        precision: ``fp32``, ``int8`` or, for TensorRT and OpenVINO's GPUs, ``fp16``.
        calibration: the data set that the checkpoint was trained on, as a path, or as `load_dataset` returned it. Its
            training split calibrates INT8 and supplies the golden frames; its validation split supplies the accuracy in
            the manifest, the comparison with the checkpoint, and the temperature. Without it the golden frames are
            generated, and only a quantised network is exported in INT8.
        config: batch size, seed, golden set, temperature.
        quantization: how to quantise an FP32 checkpoint to INT8.
        gate: how much worse than the checkpoint's own network the artifact may be on validation data. None only
            records the comparison.
        reference: for a quantised checkpoint: the FP32 checkpoint that it was trained from. The artifact is then
            compared with that instead of with the quantised network.
        skip_corrupt: leave unreadable images out instead of raising.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        DataError: a setting is out of range, or the calibration data are missing or are not the checkpoint's.
        GateError: the artifact does not pass the gate. It is not written, and an earlier one stays.
        ExportError: a step failed. Nothing half-written is left.
    """
    target = target_of(to)
    config, quantization = with_options(config), with_options(quantization)
    _check_precision(target, precision, quantization)
    check_target(out)
    found = read_header(checkpoint)
    trained = found.quantized is not None
    calibrates = precision == "int8" and not trained
    if not calibrates:
        _refuse_idle(precision, quantization)
    compared = None if reference is None else _fp32_of(found, reference, calibration)
    if calibrates and calibration is None:
        raise DataError("INT8 needs --calibration DATA: the data set that the checkpoint was trained on")
    _log.info("reading %s", checkpoint)
    network, header = _open(checkpoint, found, to, precision, quantization)
    if isinstance(calibration, Path):
        _log.info("checking %s", calibration)
    data = None if calibration is None else load_dataset(calibration, expected=header, skip_corrupt=skip_corrupt)
    samples = quantization.num_samples if calibrates else _GOLDEN_CANDIDATES
    photographs = [] if data is None else choose_balanced(data.splits["train"], samples, config.seed, data.conditions)
    job = _Job(
        checkpoint=checkpoint,
        header=header,
        target=target,
        precision=precision,
        config=config,
        quantization=target.decide_range(quantization) if calibrates else quantization,
        weight_bits=_weight_bits(target, precision, quantization, header),
        calibration=_calibrate(photographs, header.input) if calibrates else None,
    )
    if calibrates and data is not None and quantization.max_int8_drop is not None:
        job = replace(job, quantization=_keep_sensitive_layers(job, network, data))
    if trained and compared is None and data is not None:
        _log.info("comparing with the quantised checkpoint itself; --reference compares with the FP32 one before it")
    draft = _draft(job, network, [] if config.generated_golden else photographs)
    measuring = _measure(data, compared or network, header.input, gate, config.fit_temperature)
    return write_artifact(out, draft, lambda folder: _write_model(job, network, draft, folder), measuring)


def _check_precision(target: Target, precision: Precision, quantization: QuantizationConfig) -> None:
    """Raise `ExportError` for options that the target does not support, before any work is done."""
    if precision not in get_args(Precision):
        raise ExportError(f"{precision!r} is not a precision. Use one of {', '.join(get_args(Precision))}.")
    target.check(precision, quantization)


def _refuse_idle(precision: Precision, quantization: QuantizationConfig) -> None:
    """Raise `ExportError` if an option was given that changes nothing in an export that does not calibrate."""
    used = {"reduce_range"} if precision == "int8" else set()
    options = options_of(QuantizationConfig)
    if idle := [options[name].flag for name in options if name in quantization.changed() - used]:
        raise ExportError(f"{idle[0]} applies only to --precision int8 on an FP32 checkpoint. Remove it.")


def _fp32_of(header: Header, reference: Path, data: object) -> Network:
    """Load the FP32 network that a quantised one was trained from. Raises `DataError` if it is another."""
    if data is None:
        raise DataError("--reference applies only to a comparison on data. Add --calibration DATA.")
    if header.quantized is None or header.parent != sha256(reference):
        raise DataError(
            f"--reference {reference} is not the checkpoint that this one was quantised from. Give the file that"
            " `edgefg qat` read; for other checkpoints remove the option."
        )
    return load(reference)[0]


def _open(
    checkpoint: Path, found: Header, to: TargetName, precision: Precision, quantization: QuantizationConfig
) -> tuple[Network | QuantizedNetwork, Header]:
    """Load the checkpoint's network. Raises `ExportError` if it cannot be exported as asked."""
    if found.quantized is not None:
        check_trained_for(checkpoint, found.quantized, to, precision, quantization)
        return load_quantized(checkpoint)
    network, header = load(checkpoint)
    need_one_graph(network, header, checkpoint, "export")
    return network, header


def _weight_bits(
    target: Target, precision: Precision, quantization: QuantizationConfig, header: Header
) -> WeightBits | None:
    """Return the width of INT8 weights, and warn if this CPU computes with them as no other does."""
    if precision != "int8":
        return None
    bits = target.weight_bits(quantization)
    if header.quantized is not None:
        bits = 7 if header.quantized.reduce_range else 8
    if target.saturates and bits == 8 and lacks_vnni():
        _log.warning("this CPU lacks VNNI and saturates with 8-bit weights: the accuracy measured here is too low")
    return bits


def _keep_sensitive_layers(job: _Job, network: nn.Module, data: ImageDataset) -> QuantizationConfig:
    """Search the layers that have to stay in floating point; return the settings with them.

    The search has a graph of its own, since the manifest names the layers before the model file is written.
    """
    limit, samples = job.quantization.max_int8_drop, data.splits["val"]
    assert limit is not None
    assert job.calibration is not None
    if not samples:
        raise DataError(f"{data.root} has no validation images. --max-int8-drop needs some to measure the loss on.")
    with tempfile.TemporaryDirectory(prefix="edgefg-") as scratch:
        source = Path(scratch) / "model.onnx"
        _log.info("exporting to ONNX to search the layers that INT8 hurts")
        write_onnx(network, job.header.input, source, batch=job.config.batch)
        quantizer = job.target.quantizer(source, job.calibration.inputs, job.quantization, batch=job.config.batch)
        kept = find_kept(quantizer, samples, job.header.input, limit)
    return replace(job.quantization, keep_layers=(*job.quantization.keep_layers, *kept))


def _calibrate(photographs: Sequence[Path], spec: InputSpec) -> Calibration:
    _log.info("reading %d calibration images", len(photographs))
    return read_calibration(photographs, spec)


def _draft(job: _Job, network: nn.Module, photographs: Sequence[Path]) -> Draft:
    """Collect what the manifest and the golden set need; golden frames are generated if there are no photographs."""
    header = job.header
    frames = [read_image(path) for path in photographs[:_GOLDEN_CANDIDATES]] or synthetic_frames(header.input)
    golden = golden_frames(frames, header.input, len(header.labels))
    return Draft(
        labels=header.labels,
        taxonomy=header.taxonomy,
        input=header.input,
        precision=job.precision,
        weight_bits=job.weight_bits,
        provenance=_provenance(job),
        frames=golden,
        parent_logits=torch_logits(network, np.stack([prepare(frame, header.input) for frame in golden])),
    )


def _measure(
    data: ImageDataset | None, network: nn.Module, spec: InputSpec, gate: Gate | None, fit_temperature: bool
) -> Callable[[Classifier], Validation] | None:
    """Return a function that measures an artifact beside its network on validation data; ``test`` is for reports."""
    if data is None or not data.splits["val"]:
        why = "no data were given" if data is None else "there are no validation images"
        _log.warning("%s: nothing is compared with the checkpoint, and the temperature stays 1", why)
        return None
    samples, name = data.splits["val"], f"val of {data.root.resolve().name}"

    def parent(frames: list[UInt8Array]) -> FloatArray:
        return torch_logits(network, np.stack([prepare(frame, spec) for frame in frames]))

    def measuring(classifier: Classifier) -> Validation:
        _log.info("comparing with the checkpoint on %d images", len(samples))
        return validate(classifier, samples, name, parent=parent, gate=gate, fit_temperature=fit_temperature)

    return measuring


def _write_model(job: _Job, network: nn.Module, draft: Draft, folder: Path) -> Path:
    """Write the model file of an artifact into ``folder``; intermediate files are written elsewhere and removed."""
    inputs, batch = np.stack([prepare(frame, draft.input) for frame in draft.frames]), job.config.batch
    if isinstance(network, QuantizedNetwork):
        return write_quantized(network, draft.input, job.target, folder, inputs, batch=batch)
    with tempfile.TemporaryDirectory(prefix="edgefg-") as scratch:
        source = Path(scratch) / "model.onnx"
        _log.info("exporting to ONNX")
        write_onnx(network, draft.input, source, batch=batch)
        check_parity(network, source, inputs)
        if job.calibration is not None:
            _log.info("quantising for %s", job.target.title)
            quantizer = job.target.quantizer(source, job.calibration.inputs, job.quantization, batch=batch)
            model = quantizer.write(folder)
            if quantizer.remark:
                _log.info(quantizer.remark)
            return model
        if job.precision == "fp16":
            return job.target.emit_fp16(source, folder, batches(inputs, batch or 1))
        return job.target.emit(source, folder)


def _provenance(job: _Job) -> Provenance:
    header, calibration, digest = job.header, job.calibration, sha256(job.checkpoint)
    stage = ExportStage(
        target=job.target.name,
        precision=job.precision,
        config=job.config,
        quantization=None if calibration is None else replace(job.quantization, num_samples=len(calibration.inputs)),
        parents=(digest,),
        versions=versions_of("torch"),
    )
    return Provenance(
        edgefg=__version__,
        parent=digest,
        teacher=header.teacher,
        dataset=header.dataset,
        split=header.split,
        calibration=None if calibration is None else calibration.fingerprint,
        stages=encode_stages((*header.stages, stage)),
        recipe=header.recipe,
    )
