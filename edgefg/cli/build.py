"""The verb that runs on the device before all others: build."""

from __future__ import annotations

from pathlib import Path

from edgefg.cli.app import Count, MaybeCount, command, print_json, say
from edgefg.errors import DataError


@command
def build(
    models: list[Path],
    to: str = "tensorrt",
    precision: str = "auto",
    out: Path | None = None,
    batch: Count = 1,
    max_batch: MaybeCount = None,
    hardware_compatible: str = "none",
    workspace: MaybeCount = None,
    optimization_level: int = 3,
    rebuild: bool = False,
    trusted_key: Path | None = None,
    json: bool = False,
) -> None:
    """Build an engine for this very device from an ONNX artifact, and verify it. Writes engine.plan beside the model.

    Does nothing where a plan is there already that fits this device and reproduces its golden set, so that a service
    may call it at every start.

    Args:
        models: model.onnx of `edgefg export --to tensorrt-onnx`; several of one network, for instance INT8 and FP16,
            are built and measured, and the fastest is kept.
        to: tensorrt, for NVIDIA GPUs and Jetson.
        precision: auto, or which of the models to build: int8, fp16, fp32.
        out: another folder for the plan; the ONNX artifact is copied along.
        batch: usual batch, of a network that was exported with a free batch.
        max_batch: greatest batch; the usual one where left out.
        hardware_compatible: on which other GPUs it is to run: none, ampere-plus, same-capability. Slower than none.
        workspace: most memory that a layer may use while it runs, MiB; three quarters of what is free where left out.
        optimization_level: 0 builds quickest, 5 searches longest.
        rebuild: build anew even where the plan fits, and take none from the cache.
        trusted_key: PEM file of the public key that must have signed the ONNX artifacts (`edgefg sign`).
        json: print the report as one JSON object.
    """
    from edgefg.export.tensorrt.build import PRECISIONS, build_engine
    from edgefg.export.tensorrt.builder import settings_of

    if to != "tensorrt":
        raise DataError(f"cannot build for {to!r}; needed tensorrt (`edgefg export` makes OpenVINO and ONNX artifacts)")
    if precision not in PRECISIONS:
        raise DataError(f"--precision {precision!r}: no such choice; needed one of {', '.join(PRECISIONS)}")
    settings = settings_of(batch, max_batch, hardware_compatible, workspace, optimization_level)
    report = build_engine(
        models, out=out, precision=precision, settings=settings, rebuild=rebuild, trusted_key=trusted_key, progress=say
    )
    if json:
        print_json(report)
    else:
        print(report.render())
