"""Networks compiled by OpenVINO itself, to look into them or to compare with."""

from __future__ import annotations

from typing import Any

import openvino

from edgefg.signals import kept_signal_stack


def compile_for_cpu(model: Any) -> openvino.CompiledModel:
    """Compile a file or an `openvino.Model` for this CPU, in FP32 where it is not INT8."""
    with kept_signal_stack():
        return openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
