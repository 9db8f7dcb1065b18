"""The verb that makes an artifact of a checkpoint: export."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from edgefg.cli.app import Count, command, needs, say
from edgefg.cli.workstation import Out
from edgefg.quality import Gate

_GATE = Gate()


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
    images: Count = 300,
    batch: int = 1,
    any_cpu: bool = False,
    seed: int = 0,
    gate: Gate = _GATE,
    no_gate: bool = False,
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
        precision: fp32, int8, or, for tensorrt-onnx, fp16.
        images: how many images calibrate, balanced by class.
        batch: static batch size; 0 takes any.
        any_cpu: 7-bit weights in int8, for x86 CPUs without VNNI, which saturate with 8.
        seed: seed of the choice of images.
        gate: how much worse than the checkpoint the artifact may be, an option each.
        no_gate: only record the comparison, and write the artifact however it ends.
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
        any_cpu=any_cpu,
        seed=seed,
        gate=None if no_gate else gate,
        fit_temperature=not no_temperature,
        skip_corrupt=skip_corrupt,
        progress=say,
    )
    print(path)
