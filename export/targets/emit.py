"""A finished ONNX graph → the model file of its target, its arithmetic left as it is."""

from __future__ import annotations

from pathlib import Path

from edgefg.evaluation.package import STEM
from edgefg.export.targets.openvino import convert, write_ir
from edgefg.training.checkpoint import Target


def model_name(to: Target) -> str:
    """Return what a target's model file is called."""
    return f"{STEM}.xml" if to == "openvino" else f"{STEM}.onnx"


def emit(source: Path, to: Target, folder: Path) -> Path:
    """Write the model file of a target into ``folder``, from an ONNX file elsewhere; return its path.

    Raises:
        ExportError: OpenVINO does not convert the graph, or cannot write it.
    """
    path = folder / model_name(to)
    if to == "openvino":
        write_ir(convert(source), path)
    else:
        path.write_bytes(source.read_bytes())
    return path
