"""The verbs that make an artifact of a checkpoint, and tell which layers INT8 hurts: export, sensitivity."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from edgefg.cli.app import Count, command, needs, print_json, say
from edgefg.cli.workstation import Out
from edgefg.settings.gate import Gate

_GATE = Gate()


class Target(str, Enum):
    """What `export` emits."""

    openvino = "openvino"
    onnx = "onnx"
    tensorrt_onnx = "tensorrt-onnx"


class Calibrator(str, Enum):
    """How the ranges of activations are found."""

    minmax = "minmax"
    percentile = "percentile"
    mse = "mse"
    entropy = "entropy"


class Precision(str, Enum):
    """Arithmetic of the emitted network."""

    fp32 = "fp32"
    fp16 = "fp16"
    int8 = "int8"


@command
def export(
    checkpoint: Path,
    to: Annotated[Target, typer.Option()],
    out: Out,
    calibration: Path | None = None,
    precision: Precision = Precision.fp32,
    images: Count = 300,
    batch: int = 1,
    calibrator: Calibrator = Calibrator.minmax,
    any_cpu: bool | None = None,
    bias_correction: bool = False,
    keep_within: float | None = None,
    seed: int = 0,
    gate: Gate = _GATE,
    reference: Path | None = None,
    no_gate: bool = False,
    generated_golden: bool = False,
    no_temperature: bool = False,
    skip_corrupt: bool = False,
) -> None:
    """Export a checkpoint as an artifact: model file, manifest and golden set in the folder OUT.

    Where the data have validation images, the artifact is compared with the checkpoint on them before it gets its
    name: if it does not pass the gate nothing is written, and the exit status is 1. The temperature, which makes
    confidences mean what they say, is fitted on them too.

    Args:
        checkpoint: a teacher, student or pruned student.
        to: openvino (IR), onnx (for ONNX Runtime) or tensorrt-onnx (to be built on the device).
        out: folder of the artifact; an earlier artifact there is replaced once the new one is whole.
        calibration: the data set it was trained on; calibration and golden images come from its training split.
        precision: fp32, int8, or, for tensorrt-onnx and openvino (GPUs), fp16.
        images: how many images calibrate, balanced by class and, where the data name them, by conditions.
        batch: static batch size; 0 takes any.
        calibrator: how int8 finds the ranges of activations: minmax, percentile (0.001 % of all values clipped on each
            side), mse, or entropy, which is there to be compared, never taken unmeasured: elsewhere it has cost
            EfficientNet-Lite0 44 points on ImageNet.
        any_cpu: 7-bit weights in int8, for x86 CPUs without VNNI, which saturate with 8; where left out, if this CPU is
            such a one.
        bias_correction: correct the biases of an int8 network (openvino: by NNCF's slower, more exact way).
        keep_within: points of top-1 that int8 may lose against fp32 on the validation split; what hurts most stays in
            floating point until it loses no more.
        seed: seed of the choice of images.
        gate: how much worse than the checkpoint the artifact may be, an option each.
        reference: of a checkpoint that qat wrote: the FP32 one it was trained from, to compare with.
        no_gate: only record the comparison, and write the artifact however it ends.
        generated_golden: prove it by generated frames, so that no photograph goes with the artifact.
        no_temperature: leave the temperature at 1.
        skip_corrupt: leave unreadable images out instead of stopping.
    """
    try:
        from edgefg.export.export import export_checkpoint
    except ImportError as exc:
        raise needs("export", exc) from exc
    path = export_checkpoint(
        checkpoint,
        out,
        to=to.value,
        precision=precision.value,
        calibration=calibration,
        images=images,
        batch=batch,
        calibrator=calibrator.value,
        any_cpu=any_cpu,
        bias_correction=bias_correction,
        keep_within=keep_within,
        seed=seed,
        gate=None if no_gate else gate,
        reference=reference,
        generated_golden=generated_golden,
        fit_temperature=not no_temperature,
        skip_corrupt=skip_corrupt,
        progress=say,
    )
    print(path)


@command
def sensitivity(
    checkpoint: Path,
    data: Path,
    to: Annotated[Target, typer.Option()],
    images: Count = 32,
    compared: Count = 64,
    calibrator: Calibrator = Calibrator.minmax,
    seed: int = 0,
    skip_corrupt: bool = False,
    json: bool = False,
) -> None:
    """Tell what each layer's INT8 costs by itself: the logits with that layer alone quantised against FP32's.

    Args:
        checkpoint: a teacher, student or pruned student.
        data: the data set it was trained on; training images calibrate, validation images are compared.
        to: the target whose INT8 is scanned: openvino, onnx or tensorrt-onnx.
        images: how many images calibrate.
        compared: how many images are compared.
        calibrator: how the ranges of activations are found; see export.
        seed: seed of the choice of images.
        skip_corrupt: leave unreadable images out instead of stopping.
        json: print one JSON object instead of a table, the layers worst first.
    """
    try:
        from edgefg.export.quantize.layer_sensitivity import sensitivity as run
    except ImportError as exc:
        raise needs("export", exc) from exc
    found = run(
        checkpoint,
        data,
        to=to.value,
        images=images,
        compared=compared,
        calibrator=calibrator.value,
        seed=seed,
        skip_corrupt=skip_corrupt,
    )
    if json:
        print_json(found)
    else:
        print(found.render())
