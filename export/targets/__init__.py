"""Deployment targets, one object each: the only place that lists them.

A target's vendor packages are imported when they are used.
"""

from __future__ import annotations

from edgefg.errors import ExportError
from edgefg.export.targets.onnxruntime import ONNXRuntime
from edgefg.export.targets.openvino import OpenVINO
from edgefg.export.targets.target import Target
from edgefg.export.targets.tensorrt import TensorRT

TARGETS: dict[str, Target] = {target.name: target for target in (OpenVINO(), ONNXRuntime(), TensorRT())}


def target_of(name: str) -> Target:
    """Return the target of a name. Raises `ExportError` if there is none."""
    if name not in TARGETS:
        raise ExportError(f"{name!r} is not a target. Use one of {', '.join(TARGETS)}.")
    return TARGETS[name]
