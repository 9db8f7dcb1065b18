"""Verbs on artifacts before they reach a device: export, sensitivity, check, sign."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from edgefg.cli.app import Without, command, needs, print_json
from edgefg.cli.options import Count, Flag, Json, Out, SkipCorrupt, TargetOption
from edgefg.errors import DataError
from edgefg.settings.export import ExportConfig
from edgefg.settings.gate import Gate
from edgefg.settings.quantization import Precision, QuantizationConfig


@command
def export(
    checkpoint: Path,
    /,
    *,
    to: TargetOption,
    out: Out,
    calibration: Path | None = None,
    precision: Precision = "fp32",
    quantization: QuantizationConfig = QuantizationConfig(),
    config: ExportConfig = ExportConfig(),
    gate: Gate = Gate(),
    reference: Path | None = None,
    no_gate: Flag = False,
    skip_corrupt: SkipCorrupt = False,
) -> None:
    """Export a checkpoint as an artifact.

    An artifact is a model file, its manifest and its golden set. If the data have validation images, the artifact is
    compared with the checkpoint on them, and the temperature of its confidences is fitted. If the gate fails, nothing
    is written and the exit status is 1. An earlier artifact in OUT is replaced once the new one is complete.

    Args:
        checkpoint: A teacher, student or pruned student.
        calibration: The data set that it was trained on. Calibration and golden images come from its training split.
        precision: fp16 is for tensorrt-onnx, and for openvino on GPUs.
        reference: The FP32 parent of a checkpoint that `edgefg qat` wrote, to compare with.
        no_gate: Record the comparison, and write the artifact whatever its result.
    """
    with needs("export"):
        from edgefg.export.export import export_checkpoint
    path = export_checkpoint(
        checkpoint,
        out,
        to=to,
        precision=precision,
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
    /,
    *,
    to: TargetOption,
    quantization: Annotated[
        QuantizationConfig, Without("bias_correction", "max_int8_drop", "keep_layers")
    ] = QuantizationConfig(num_samples=32),
    compared: Count = 64,
    seed: int = 0,
    skip_corrupt: SkipCorrupt = False,
    json: Json = False,
) -> None:
    """Measure how sensitive each layer is to INT8.

    One layer at a time is quantised, and the logits are compared with those of the FP32 network. The most sensitive
    layers come first.

    Args:
        checkpoint: A teacher, student or pruned student.
        data: The data set that it was trained on. Training images calibrate, validation images are compared.
        compared: Number of images that are compared.
        seed: Seed of the choice of images.
    """
    with needs("export"):
        from edgefg.export.quantize.layer_sensitivity import sensitivity as run
        from edgefg.export.targets import target_of
    found = run(
        checkpoint,
        data,
        target_of(to),
        compared=compared,
        quantization=quantization,
        seed=seed,
        skip_corrupt=skip_corrupt,
    )
    if json:
        print_json(found)
    else:
        print(found.render())


@command
def check(
    model: Path,
    /,
    *,
    target: Annotated[Literal["tensorrt"], Parameter(name="--for")] = "tensorrt",
    json: Json = False,
) -> None:
    """Check an ONNX graph against the rules of TensorRT.

    The rules are those of explicit quantisation in TensorRT 10 and 11. The exit status is 1 if one is broken.

    Args:
        model: An ONNX file with QuantizeLinear and DequantizeLinear nodes.
        target: The engine that will build the graph.
    """
    with needs("export"):
        from edgefg.export.onnx.check import check as run
    report = run(model)
    if json:
        print_json(report)
    else:
        print(report.render())
    if report.broken:
        sys.exit(1)


@command
def sign(artifact: Path, /, *, key: Path | None = None, new_key: Path | None = None) -> None:
    """Sign an artifact with an Ed25519 key.

    A device then refuses other artifacts: Classifier(path, trusted_key="public.pem"). All files are compared with the
    manifest before it is signed. The signature is written beside the manifest.

    Args:
        artifact: The model file.
        key: The private key, a PEM file.
        new_key: Create a key pair and sign with it. The private key is written to this file, the public one to
            public.pem beside it.
    """
    from edgefg.artifact.signature import new_key as make
    from edgefg.artifact.signature import sign as run

    if key is not None and new_key is not None:
        raise DataError("--key and --new-key exclude each other. Give one of them")
    private = key or new_key
    if private is None:
        raise DataError("no key to sign with. Give --key private.pem, or --new-key private.pem to create a key pair")
    if new_key is not None:
        print(f"{make(new_key)} is for your devices; keep {new_key} secret")
    print(run(artifact, private))
