"""ONNX → OpenVINO IR: FP32 weights, the batch size of the ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgefg.errors import ExportError, one_line
from edgefg.quiet import quiet


def convert(onnx_path: Path) -> Any:
    """Convert an ONNX file to an `openvino.Model`. Raises `ExportError`."""
    try:
        with quiet():
            import openvino

            return openvino.convert_model(str(onnx_path))
    except Exception as exc:  # OpenVINO raises RuntimeError, its converter a family of its own
        raise ExportError(f"OpenVINO does not convert the ONNX graph: {one_line(exc)[:300]}") from exc


def write_ir(model: Any, path: Path) -> None:
    """Write an `openvino.Model` as ``path`` (``.xml``) and, beside it, its weights (``.bin``), in full precision.

    Raises `ExportError`: the disk is full, for one.
    """
    try:
        with quiet():
            import openvino

            openvino.save_model(model, str(path), compress_to_fp16=False)
    except RuntimeError as exc:
        raise ExportError(f"OpenVINO could not write the IR: {one_line(exc)[:300]}; is the disk full?") from exc
    weights = path.with_suffix(".bin")
    if not path.is_file() or not weights.is_file():
        raise ExportError(f"OpenVINO wrote no {path.name} or no {weights.name}; is the disk full?")
