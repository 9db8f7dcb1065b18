"""The verbs that export a checkpoint as an artifact, and show which layers INT8 hurts: export, sensitivity."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from edgefg.cli.app import Count, Except, command, needs, print_json
from edgefg.cli.workstation import Out
from edgefg.settings.export import ExportConfig
from edgefg.settings.gate import Gate
from edgefg.settings.quantization import QuantizationConfig

_CONFIG = ExportConfig()
_QUANTIZATION = QuantizationConfig()
_GATE = Gate()
_SCAN = Except("bias_correction", "max_int8_drop", "keep_layers")
_SCAN_DEFAULTS = QuantizationConfig(num_samples=32)


class Target(str, Enum):
    """What `export` emits."""

    openvino = "openvino"
    onnx = "onnx"
    tensorrt_onnx = "tensorrt-onnx"


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
    quantization: QuantizationConfig = _QUANTIZATION,
    config: ExportConfig = _CONFIG,
    gate: Gate = _GATE,
    reference: Path | None = None,
    no_gate: bool = False,
    skip_corrupt: bool = False,
) -> None:
    """Export a checkpoint as an artifact: model file, manifest and golden set in the folder OUT.

    If the data have validation images, the artifact is compared with the checkpoint on them before it gets its name:
    an artifact that does not pass the gate is not written, and the exit status is 1. The temperature, which calibrates
    the confidences, is fitted on them too.

    Args:
        checkpoint: a teacher, student or pruned student.
        to: openvino (IR), onnx (for ONNX Runtime) or tensorrt-onnx (to be built on the device).
        out: folder of the artifact; an earlier artifact there is replaced once the new one is whole.
        calibration: the data set it was trained on; calibration and golden images come from its training split.
        precision: fp32, int8, or, for tensorrt-onnx and openvino (GPUs), fp16.
        quantization: how int8 is made from an FP32 checkpoint, an option each.
        config: how the artifact is made and proven, an option each.
        gate: how much worse than the checkpoint the artifact may be, an option each.
        reference: for a checkpoint that qat wrote: the FP32 one it was trained from, to compare with.
        no_gate: write the artifact whatever the comparison shows, and only record it.
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
        config=config,
        quantization=quantization,
        gate=None if no_gate else gate,
        reference=reference,
        skip_corrupt=skip_corrupt,
    )
    print(path)


@command
def sensitivity(
    checkpoint: Path,
    data: Path,
    to: Annotated[Target, typer.Option()],
    quantization: Annotated[QuantizationConfig, _SCAN] = _SCAN_DEFAULTS,
    compared: Count = 64,
    seed: int = 0,
    skip_corrupt: bool = False,
    json: bool = False,
) -> None:
    """Show how sensitive each layer is to INT8: the logits with only that layer quantised against FP32's.

    Args:
        checkpoint: a teacher, student or pruned student.
        data: the data set it was trained on; training images calibrate, validation images are compared.
        to: the target whose INT8 is scanned: openvino, onnx or tensorrt-onnx.
        quantization: how layers are quantised, an option each.
        compared: how many images are compared.
        seed: seed of the choice of images.
        skip_corrupt: leave unreadable images out instead of stopping.
        json: print one JSON object instead of a table, the layers worst first.
    """
    try:
        from edgefg.export.quantize.layer_sensitivity import sensitivity as run
        from edgefg.export.targets import target_of
    except ImportError as exc:
        raise needs("export", exc) from exc
    found = run(
        checkpoint,
        data,
        target_of(to.value),
        compared=compared,
        quantization=quantization,
        seed=seed,
        skip_corrupt=skip_corrupt,
    )
    if json:
        print_json(found)
    else:
        print(found.render())
