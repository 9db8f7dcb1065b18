"""Quantisation-aware training: the last step, which recovers what INT8 lost. Student → quantised student.

    edgefg qat runs/x/pruned.safetensors DATA --teacher runs/x/teacher.safetensors --to tensorrt-onnx --out runs/x/trt

The target's own quantiser is run once, as for an export, and says where the deployed graph rounds and in which ranges.
The network, batch norms folded, then learns with fake quantisers in those places (Jacob et al. 2018): activations keep
their calibrated ranges, weights have ranges that follow them. What it learns are the teacher's predictions on identical
crops; without a teacher those of the student before quantisation.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import onnx
import torch
from msgspec.structs import replace
from torch import nn

from edgefg import __version__
from edgefg.artifact.hashes import sha256
from edgefg.data import ImageDataset, load_dataset
from edgefg.data.calibration import choose_balanced, read_calibration
from edgefg.errors import DataError
from edgefg.export.distill.objective import Distillation, Teacher, open_teacher_cache, read_teachers
from edgefg.export.qat.fake_quantize import Rounding
from edgefg.export.qat.quantized_network import QuantizedNetwork
from edgefg.export.qat.quantizers import quantizers_of_onnx, quantizers_of_openvino
from edgefg.export.quantize.calibrators import Calibrator
from edgefg.export.quantize.qdq import quantize_openvino
from edgefg.export.quantize.quantizer import SEVEN_BITS, Quantizer, needs_seven_bits
from edgefg.export.targets.openvino import convert
from edgefg.export.tracing.onnx_exporter import need_one_graph
from edgefg.export.tracing.trainable_graph import trace
from edgefg.preprocess import UInt8Array
from edgefg.settings.distillation import DistillationConfig
from edgefg.settings.hardware import Hardware
from edgefg.settings.options import with_options
from edgefg.settings.training import TrainingConfig
from edgefg.training.checkpoint import Header, Quantized, Target, load
from edgefg.training.loop.stage import train_and_save
from edgefg.training.models.network import Network, NoOptions


def qat(
    student_path: Path,
    data: Path | ImageDataset,
    out: Path,
    config: TrainingConfig,
    *,
    to: Target,
    teacher_path: Path | None = None,
    distillation: DistillationConfig | None = None,
    teacher_cache: Path | None = None,
    images: int = 300,
    calibrator: Calibrator = "minmax",
    any_cpu: bool | None = None,
    hardware: Hardware | None = None,
    skip_corrupt: bool = False,
    restart: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Train a network for the INT8 graph of one target; return the path of ``out/qat.safetensors``.

    Args:
        student_path: checkpoint of a network of a single pass: a student, a pruned one, or a teacher.
        data: the data it was trained on, as a path, or loaded by `load_dataset`.
        out: folder for the checkpoint and the run's files.
        config: the training's settings; the input size stays the student's.
        to: target, as for `edgefg.export.export.export_checkpoint`.
        teacher_path: whose predictions to learn; those of the network itself in FP32 where left out.
        distillation: what to learn of the teacher; of its predictions alone.
        teacher_cache: see `edgefg.export.distill.distill.distill`.
        images: how many training images calibrate, balanced by class.
        calibrator: how activation ranges are found, see `edgefg.export.quantize.calibrators`.
        any_cpu: 7-bit weights, see `edgefg.export.export.export_checkpoint`.
        hardware: where to run; ``auto`` precision is FP32, since FP16 and bfloat16 round more coarsely than 8 bits do.
        skip_corrupt: leave unreadable images out.
        restart: begin anew where an unfinished run lies in ``out``.
        progress: called with one line for each step.

    Raises:
        CheckpointError, DataError, TrainingError: before the first step.
        ExportError: the network is no single graph, or cannot be traced or quantised.
    """
    say = progress or (lambda _: None)
    if any_cpu and to == "tensorrt-onnx":
        raise DataError("7-bit weights are for CPUs; leave out --any-cpu for tensorrt-onnx")
    predictions = (distillation or DistillationConfig()).without_maps()
    network, header = load(student_path)
    need_one_graph(network, header, student_path, "quantise")
    (teacher,) = read_teachers([teacher_path or student_path])
    if teacher.header.labels != header.labels:
        raise DataError(f"{teacher_path} and {student_path} have different classes; needed the student's teacher")
    _, data = Network.prepare(NoOptions(), load_dataset(data, expected=header, skip_corrupt=skip_corrupt))
    config = with_options(config, image_size=header.input.height)
    quantized = Quantized(to=to, any_cpu=needs_seven_bits(to, any_cpu), torch=str(torch.__version__))
    if quantized.any_cpu and any_cpu is None:
        say(SEVEN_BITS)
    header = _header_of(header, student_path, teacher, quantized)
    words = [header.recipe, *predictions.words(), f"{images} images", calibrator]
    header = replace(header, recipe=", ".join(words))
    trained: nn.Module = network
    # A finished run is for `train_and_save` to recognise, by its header alone.
    if restart or not (out / f"{header.kind}.safetensors").exists():
        chosen = choose_balanced(data.splits["train"], images, config.schedule.seed, data.conditions)
        say(f"reading {len(chosen)} calibration images")
        inputs = read_calibration(chosen, header.input).inputs
        say(f"quantising for {to}")
        trained = quantized_for(network, header, inputs, calibrator)
    kept = None if teacher_cache is None else open_teacher_cache(teacher_cache, [teacher], predictions)
    say("training with the quantisers")
    hardware = hardware or Hardware()
    if hardware.precision == "auto":
        hardware = replace(hardware, precision="32-true")
    return train_and_save(
        trained,
        header,
        data,
        config,
        Distillation([teacher], trained, config, predictions, kept),
        out,
        hardware=hardware,
        frozen_modules=[teacher.network],
        restart=restart,
    )


def _header_of(header: Header, student_path: Path, teacher: Teacher, quantized: Quantized) -> Header:
    """Return the header of the quantised network but for how it was calibrated."""
    any_cpu = ", any CPU" if quantized.any_cpu else ""
    return replace(
        header,
        kind="qat",
        quantized=quantized,
        parent=sha256(student_path),
        recipe=f"{header.recipe}; qat for {quantized.to}{any_cpu}, teacher {teacher.sha256[:12]}",
        validation=None,
        edgefg=__version__,
    )


def quantized_for(
    network: Network, header: Header, inputs: UInt8Array, calibrator: Calibrator = "minmax"
) -> QuantizedNetwork:
    """Return a network with fake quantisers where its target's quantiser has quantisers, in the same ranges.

    Args:
        network: FP32, in evaluation mode.
        header: of the quantised network: its input, and what it is quantised for.
        inputs: ``uint8 [K, height, width, 3]`` RGB that calibrate.
        calibrator: see `edgefg.export.quantize.calibrators`.

    Raises:
        ExportError: the network cannot be traced or quantised.
    """
    quantized = header.quantized
    assert quantized is not None
    traced = trace(network, header.input, fold_scale=quantized.to == "openvino")
    with tempfile.TemporaryDirectory(prefix="edgefg-") as scratch:
        source = Path(scratch) / "float.onnx"
        source.write_bytes(traced.model.SerializeToString())
        found: dict[str, Rounding]
        if quantized.to == "openvino":
            found = quantizers_of_openvino(quantize_openvino(convert(source), inputs, batch=0, calibrator=calibrator))
        else:
            quantizer = Quantizer(quantized.to, source, inputs, batch=0, calibrator=calibrator)
            found = quantizers_of_onnx(onnx.load(quantizer.write(Path(scratch))))
    return QuantizedNetwork(traced.graph, found, any_cpu=quantized.any_cpu)
