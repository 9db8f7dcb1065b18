"""Quantisation-aware training: recovers the accuracy that INT8 costs. Student → quantised student.

    edgefg qat runs/x/pruned.safetensors DATA --teacher runs/x/teacher.safetensors --to tensorrt-onnx --out runs/x/trt

The target's quantiser runs once, as for an export, and shows where the deployed graph rounds, and in which ranges. The
network, batch norms folded, then learns with fake quantisers in those places (Jacob et al. 2018): activations keep
their calibrated ranges, the ranges of weights follow the weights. It learns the teacher's predictions on identical
crops; without a teacher, those of the student before quantisation.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from msgspec.structs import replace

from edgefg import __version__
from edgefg.artifact.hashes import sha256
from edgefg.artifact.stages import QATStage, versions_of
from edgefg.data import ImageDataset, load_dataset
from edgefg.data.calibration import choose_balanced, read_calibration
from edgefg.errors import DataError
from edgefg.export.distill.objective import DistillationObjective, load_teachers, open_teacher_cache
from edgefg.export.qat.quantized_network import QuantizedNetwork
from edgefg.export.targets import target_of
from edgefg.export.targets.target import Target
from edgefg.export.tracing.onnx_exporter import need_one_graph
from edgefg.export.tracing.trainable_graph import trace
from edgefg.log import get_logger
from edgefg.preprocess import InputSpec, UInt8Array
from edgefg.settings.distillation import DistillationConfig
from edgefg.settings.hardware import Hardware
from edgefg.settings.options import with_options
from edgefg.settings.quantization import QuantizationConfig, TargetName
from edgefg.settings.training import TrainingConfig
from edgefg.training.checkpoint import SCHEMA, Header, Quantized, load
from edgefg.training.loop.stage import train_and_save
from edgefg.training.models.network import Network, NoOptions, TrainableNetwork

_log = get_logger(__name__)
_QUANTIZATION = QuantizationConfig()


def qat(
    student_path: Path,
    data: Path | ImageDataset,
    out: Path,
    config: TrainingConfig,
    *,
    to: TargetName,
    teacher_path: Path | None = None,
    distillation: DistillationConfig | None = None,
    teacher_cache: Path | None = None,
    quantization: QuantizationConfig = _QUANTIZATION,
    hardware: Hardware | None = None,
    skip_corrupt: bool = False,
    restart: bool = False,
) -> Path:
    """Train a network for the INT8 graph of one target; return the path of ``out/qat.safetensors``.

    Args:
        student_path: checkpoint of a network of a single pass: a student, a pruned one, or a teacher.
        data: the data it was trained on, as a path, or loaded by `load_dataset`.
        out: folder for the checkpoint and the run's files.
        config: the training's settings; the input size stays the student's.
        to: target, as for `edgefg.export.export.export_checkpoint`.
        teacher_path: checkpoint whose predictions are learned. Default: the network itself, in FP32.
        distillation: what to learn from the teacher; only its predictions are used.
        teacher_cache: see `edgefg.export.distill.distill.distill`.
        quantization: calibrator, number of calibration images and weight range. ``bias_correction`` and
            ``max_int8_drop`` are not used, since training replaces them.
        hardware: where to run. ``auto`` precision is FP32, since FP16 and bfloat16 round more coarsely than 8 bits do.
        skip_corrupt: leave unreadable images out.
        restart: discard an unfinished run in ``out``.

    Raises:
        CheckpointError, DataError, TrainingError: before the first step.
        ExportError: the target does not support the settings, or the network is not a single graph or cannot be traced
            or quantised.
    """
    target, quantization = target_of(to), with_options(quantization)
    target.check("int8", quantization)
    if quantization.keep_layers:
        raise DataError("--keep-layers does not apply to quantisation-aware training. Remove it.")
    predictions = (distillation or DistillationConfig()).without_maps().resolved()
    network, header = load(student_path)
    need_one_graph(network, header, student_path, "quantise")
    (teacher,) = load_teachers([teacher_path or student_path])
    if teacher.header.labels != header.labels:
        raise DataError(f"{teacher_path} and {student_path} have different classes. Give the student's own teacher.")
    _, data = Network.prepare(NoOptions(), load_dataset(data, expected=header, skip_corrupt=skip_corrupt))
    config = with_options(config, image_size=header.input.height)
    quantization = target.decide_range(quantization)
    stage = QATStage(
        target=to,
        quantization=quantization,
        training=config,
        distillation=predictions,
        parents=(sha256(student_path), teacher.sha256),
        versions=versions_of("torch", "timm"),
    )
    header = _header_of(header, stage)
    trained: TrainableNetwork = network
    # `train_and_save` recognises a finished run by its header, so nothing is calibrated for it.
    if restart or not (out / f"{header.kind}.safetensors").exists():
        chosen = choose_balanced(data.splits["train"], quantization.num_samples, config.schedule.seed, data.conditions)
        _log.info("reading %d calibration images", len(chosen))
        inputs = read_calibration(chosen, header.input).inputs
        _log.info("quantising for %s", target.title)
        trained = quantized_for(network, header.input, target, inputs, quantization)
    kept = None if teacher_cache is None else open_teacher_cache(teacher_cache, [teacher], predictions)
    _log.info("training with the quantisers")
    hardware = hardware or Hardware()
    if hardware.precision == "auto":
        hardware = replace(hardware, precision="32-true")
    return train_and_save(
        trained,
        header,
        data,
        DistillationObjective([teacher], trained, config, predictions, kept),
        out,
        hardware=hardware,
        frozen_modules=[teacher.network],
        restart=restart,
    )


def _header_of(header: Header, stage: QATStage) -> Header:
    """Return the header of the quantised network."""
    reduce_range = bool(stage.quantization.reduce_range)
    return replace(
        header,
        schema=SCHEMA,
        kind="qat",
        quantized=Quantized(to=stage.target, reduce_range=reduce_range, torch=str(torch.__version__)),
        parent=stage.parents[0],
        stages=(*header.stages, stage),
        validation=None,
        edgefg=__version__,
    )


def quantized_for(
    network: Network,
    spec: InputSpec,
    target: Target,
    inputs: UInt8Array,
    quantization: QuantizationConfig = _QUANTIZATION,
) -> QuantizedNetwork:
    """Return a network with fake quantisers where its target's quantiser has quantisers, in the same ranges.

    Args:
        network: FP32, in evaluation mode.
        spec: the network's input.
        target: the target.
        inputs: calibration images, ``uint8 [K, height, width, 3]`` RGB.
        quantization: calibrator and weight range.

    Raises:
        ExportError: the network cannot be traced or quantised.
    """
    plain = replace(quantization, bias_correction=False)
    traced = trace(network, spec, fold_scale=target.folds_scale)
    with tempfile.TemporaryDirectory(prefix="edgefg-") as scratch:
        source = Path(scratch) / "float.onnx"
        source.write_bytes(traced.model.SerializeToString())
        model = target.quantizer(source, inputs, plain, batch=0).write(Path(scratch))
        activations = target.activation_params(model)
    return QuantizedNetwork(traced.graph, activations, reduce_range=target.weight_bits(quantization) == 7)
