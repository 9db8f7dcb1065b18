"""The verb that reads a graph before a device does: check."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgefg.cli.app import command, needs, print_json
from edgefg.errors import DataError


@command
def check(model: Path, target: Annotated[str, typer.Option("--for")] = "tensorrt", json: bool = False) -> None:
    """Tell whether an ONNX graph keeps the rules of the engine that is to build it. Exit status 1 where it does not.

    Args:
        model: an ONNX file, with its QuantizeLinear and DequantizeLinear nodes.
        target: the engine: tensorrt (explicit quantisation, TensorRT 10 and 11).
        json: print the rules and what breaks them as one JSON object.
    """
    if target != "tensorrt":
        raise DataError(f"--for {target!r}: no such choice; needed tensorrt")
    try:
        from edgefg.export.onnx.check import check as run
    except ImportError as exc:
        raise needs("export", exc) from exc
    report = run(model)
    if json:
        print_json(report)
    else:
        print(report.render())
    if report.broken:
        raise typer.Exit(1)
