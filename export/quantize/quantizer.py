"""One FP32 graph, its calibration images and a target: INT8 model files of it, with any of its layers kept as they are.

What `edgefg.export.export` writes once, and `edgefg.export.quantize.layer_sensitivity` and
`edgefg.export.quantize.mixed_precision` many times.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import onnx
import torch

from edgefg.export.onnx.graph import Graph
from edgefg.export.quantize.calibrators import Calibrator
from edgefg.export.quantize.qdq import (
    LAYERS,
    activation_ranges,
    quantize_onnxruntime,
    quantize_openvino,
    quantize_tensorrt,
)
from edgefg.export.targets.emit import model_name
from edgefg.export.targets.openvino import convert, write_ir
from edgefg.preprocess import UInt8Array
from edgefg.training.checkpoint import Target

# What an x86 CPU needs to sum 8-bit products in 32 bits; without, pairs of them saturate at 16.
_EXACT_SUMS = ("avx512_vnni", "avx_vnni", "amx_int8")

SEVEN_BITS = (
    "this CPU has no VNNI: weights take 7 bits, since OpenVINO saturates with 8 here and ONNX Runtime is slow"
    " (--no-any-cpu takes 8)"
)
"""Said where nothing was asked."""


def saturates() -> bool:
    """Whether this machine's CPU is an x86 one without VNNI. False where torch is too old to tell."""
    look: Callable[[], Mapping[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
    found = look()
    return str(found.get("architecture")).startswith("x86") and not any(found.get(name) for name in _EXACT_SUMS)


def needs_seven_bits(to: Target, any_cpu: bool | None) -> bool:
    """Say whether INT8 weights get 7 bits: as asked, or, where it was not, if this CPU does badly with 8.

    Without VNNI OpenVINO saturates with 8, and ONNX Runtime (see `edgefg.runtime.EXACT_SUMS`) is no quicker than FP32.

    Args:
        to: the target; TensorRT's GPUs sum exactly.
        any_cpu: what was asked; None where nothing was.
    """
    return to != "tensorrt-onnx" and (saturates() if any_cpu is None else any_cpu)


class Quantizer:
    """Writes INT8 model files of one network.

    Args:
        to: the target.
        source: FP32 ONNX of ``uint8 [batch, height, width, 3]``; it must stay where it is.
        inputs: calibration images, ``uint8 [K, height, width, 3]`` RGB.
        batch: the file's fixed batch size; 0 where it is free.
        calibrator: see `edgefg.export.quantize.calibrators`.
        any_cpu: see `needs_seven_bits`.
        bias_correction: see `edgefg.export.quantize.bias_correction`; with OpenVINO NNCF's correction layer by layer.
    """

    def __init__(
        self,
        to: Target,
        source: Path,
        inputs: UInt8Array,
        *,
        batch: int = 1,
        calibrator: Calibrator = "minmax",
        any_cpu: bool | None = None,
        bias_correction: bool = False,
    ) -> None:
        self.to = to
        self.source = source
        self.remark = ""
        """What is to be said of the last file that was written; empty where there is nothing."""
        self._inputs = inputs
        self._options: dict[str, Any] = {"batch": batch, "calibrator": calibrator}
        self._bias_correction = bias_correction
        self._any_cpu: dict[str, Any] = {} if to == "tensorrt-onnx" else {"any_cpu": needs_seven_bits(to, any_cpu)}

    @functools.cached_property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers with constant weights that this target quantises, in the order of the graph."""
        graph = Graph(onnx.load(self.source))
        kinds = LAYERS[:2] if self.to == "tensorrt-onnx" else LAYERS
        return tuple(node.name for node in graph.nodes if node.op_type in kinds and node.input[1] in graph.constants)

    @functools.cached_property
    def _ranges(self) -> Any:
        """The ranges of the activations, which do not depend on what is kept. NNCF finds its own every time."""
        assert self.to != "openvino"
        return activation_ranges(self.to, self.source, self._inputs, **self._options)

    def write(self, folder: Path, keep: Collection[str] = ()) -> Path:
        """Write the model file into a folder and return its path.

        Args:
            folder: an earlier file there is replaced.
            keep: those of `layers` that stay in floating point.

        Raises:
            ExportError: the network cannot be quantised.
        """
        return self._write(folder, keep, bias_correction=self._bias_correction)

    def write_alone(self, folder: Path, layer: str) -> Path:
        """Write a file that has one layer in INT8, and nothing else; otherwise as `write`."""
        keep = [name for name in self.layers if name != layer]
        return self._write(folder, keep, bias_correction=False, layers_only=True)

    def _write(self, folder: Path, keep: Collection[str], **how: Any) -> Path:
        options = {**self._options, **self._any_cpu, **how, "keep": keep}
        target = folder / model_name(self.to)
        if self.to == "openvino":
            write_ir(quantize_openvino(convert(self.source), self._inputs, **options), target)
            return target
        if self.to == "onnx":
            quantize_onnxruntime(self.source, target, self._inputs, ranges=self._ranges, **options)
        else:
            why_not = quantize_tensorrt(self.source, target, self._inputs, ranges=self._ranges, **options)
            self.remark = f"what stays floating point is {f'FP32: {why_not}' if why_not else 'FP16'}"
        return target
