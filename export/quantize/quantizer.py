"""INT8 model files of one FP32 graph, with any of its layers kept in floating point.

Each target has a `Quantizer` of its own. An export writes one file with it; the scan of layers
(`edgefg.export.quantize.layer_sensitivity`) and the search for mixed precision
(`edgefg.export.quantize.mixed_precision`) write many.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import onnx
import torch

from edgefg.data.calibration import batches
from edgefg.errors import ExportError
from edgefg.export.onnx.graph import Graph
from edgefg.preprocess import UInt8Array
from edgefg.settings.quantization import QuantizationConfig, TargetName

# Instructions with which an x86 CPU sums 8-bit products in 32 bits. Without them, pairs of products saturate at 16.
_EXACT_SUMS = ("avx512_vnni", "avx_vnni", "amx_int8")
LAYERS = ("Conv", "Gemm", "MatMul")
"""ONNX operators with weights, which are quantised, or kept in floating point, one by one."""


def lacks_vnni() -> bool:
    """Tell whether this machine has an x86 CPU without VNNI. False if torch is too old to tell."""
    look: Callable[[], Mapping[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
    found = look()
    return str(found.get("architecture")).startswith("x86") and not any(found.get(name) for name in _EXACT_SUMS)


class Quantizer(abc.ABC):
    """Writes INT8 model files of one network for one target.

    Args:
        source: FP32 ONNX of ``uint8 [batch, height, width, 3]``; it must stay where it is.
        inputs: calibration images, ``uint8 [K, height, width, 3]`` RGB.
        config: how to quantise. ``reduce_range`` is True or False; None counts as False.
        batch: the file's fixed batch size; 0 if it is free.
    """

    target: ClassVar[TargetName]
    layer_ops: ClassVar[tuple[str, ...]] = LAYERS
    """Those of `LAYERS` that the target quantises."""

    def __init__(self, source: Path, inputs: UInt8Array, config: QuantizationConfig, *, batch: int = 1) -> None:
        self.source = source
        self.config = config
        self.batch = batch
        self.remark = ""
        """A remark on the last file that was written; empty if there is none."""
        self._inputs = inputs
        self._data = batches(inputs, batch or 1)

    @functools.cached_property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers with constant weights that the target quantises, in the order of the graph."""
        graph = Graph(onnx.load(self.source))
        return tuple(
            node.name for node in graph.nodes if node.op_type in self.layer_ops and node.input[1] in graph.constants
        )

    def write(self, folder: Path, keep: Collection[str] = ()) -> Path:
        """Write the model file into a folder and return its path.

        Args:
            folder: an earlier file in it is replaced.
            keep: names of `layers` that stay in floating point, in addition to ``config.keep_layers``.

        Raises:
            ExportError: the network cannot be quantised, or has no such layer.
        """
        asked = self.config.keep_layers
        if asked and (unknown := sorted(set(asked) - set(self.layers))):
            raise ExportError(
                f"the network has no layer {unknown[0]!r} that INT8 would quantise."
                " `edgefg sensitivity` lists the layers."
            )
        return self._write(folder, sorted({*asked, *keep}), layers_only=False)

    def write_single(self, folder: Path, layer: str) -> Path:
        """Write a model file in which one layer is INT8 and everything else floating point; otherwise as `write`."""
        return self._write(folder, [name for name in self.layers if name != layer], layers_only=True)

    @abc.abstractmethod
    def _write(self, folder: Path, keep: Collection[str], *, layers_only: bool) -> Path:
        """Write the model file. With ``layers_only``, operators without weights stay in floating point too."""


class MakesQuantizers(Protocol):
    """The part of a deployment target that this package needs; `edgefg.export.targets.target.Target` has it."""

    def quantizer(self, source: Path, inputs: UInt8Array, config: QuantizationConfig, *, batch: int = 1) -> Quantizer:
        """Return a quantiser of an FP32 graph for this target."""
