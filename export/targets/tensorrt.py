"""TensorRT: ONNX for a strongly typed network that a device builds; INT8 as an explicit QDQ graph, the rest in FP16.

All int8 symmetric, weights per channel, biases in floating point, Q/DQ where TensorRT fuses it
(`edgefg.export.onnx.rules`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import onnx

from edgefg.data.calibration import batches
from edgefg.errors import ExportError
from edgefg.export.onnx.fp16 import activation_overflow, rest_to_half
from edgefg.export.onnx.fp16_blocklist import fp16_blocklist, fp32_tensors
from edgefg.export.onnx.graph import Graph
from edgefg.export.onnx.rules import FULL_PRECISION, broken_rules
from edgefg.export.onnx.session import graph_logits
from edgefg.export.quantize.pairs import without_pairs
from edgefg.export.quantize.qdq import QDQQuantizer
from edgefg.export.quantize.quantizer import Quantizer
from edgefg.export.targets.target import Target
from edgefg.log import get_logger
from edgefg.preprocess import UInt8Array
from edgefg.settings.quantization import QuantizationConfig

_log = get_logger(__name__)

# How many calibration images decide on FP16, and how far FP16 may move the logits away from the FP32 network's: as a
# multiple of the deviation that int8 causes by itself, and as a share of the greatest logit.
_COMPARED = 16
_WORSE = 1.5
_MARGIN = 0.01
_LAYERS = ("Conv", "Gemm")


class TensorRTQuantizer(QDQQuantizer):
    """Writes the QDQ ONNX that TensorRT reads.

    Q/DQ stand on the inputs of Conv and Gemm only, so that a convolution fuses with the activation or the residual Add
    behind it, and on the skip of every residual Add. Operators without Q/DQ are FP16, in which a strongly typed
    TensorRT network then computes them, unless FP16 spoils the logits; the file's metadata then say why.
    """

    target = "tensorrt-onnx"
    layer_ops = _LAYERS
    activations = "QInt8"
    op_types = _LAYERS
    options = {  # noqa: RUF012
        "ActivationSymmetric": True,
        "WeightSymmetric": True,
        "AddQDQPairToWeight": True,
        "QuantizeBias": False,
        "OpTypesToExcludeOutputQuantization": list(_LAYERS),
    }
    quantizes_skips = True

    def _write(self, folder: Path, keep: Collection[str], *, layers_only: bool) -> Path:
        path = super()._write(folder, keep, layers_only=layers_only)
        self.remark = finish(self.source, path, self._inputs, batch=self.batch)
        return path


def finish(source: Path, target: Path, inputs: UInt8Array, *, batch: int = 1) -> str:
    """Cast the floating-point part of the QDQ file ``target`` to FP16, and check TensorRT's rules.

    Args:
        source: the same graph without pairs.
        target: changed in place.
        inputs: ``uint8 [K, height, width, 3]`` RGB, to compare FP16 with FP32.
        batch: the graphs' fixed batch size; 0 if it is free.

    Returns:
        The precision of the floating-point part, in one line, and the reason if it is FP32.

    Raises:
        ExportError: TensorRT would refuse the graph.
    """
    why_not = _rest_to_half(source, target, batches(inputs[:_COMPARED], batch or 1))
    model = onnx.load(target)
    if why_not:
        model.metadata_props.add(key=FULL_PRECISION, value=why_not)
        target.write_bytes(model.SerializeToString())
    if refused := [broken for broken in broken_rules(model) if broken.refused]:
        raise ExportError(f"TensorRT would refuse the quantised graph: {refused[0].render()}")
    return (
        f"operators that are not quantised are FP32: {why_not}"
        if why_not
        else "operators that are not quantised are FP16"
    )


def _rest_to_half(source: Path, target: Path, data: Sequence[UInt8Array]) -> str:
    """Cast the floating-point part of ``target`` to FP16; return why not if that loses the FP32 parent's logits."""
    graph = Graph(onnx.load(source))
    try:
        half = rest_to_half(onnx.load(target)).SerializeToString()
        if overflow := activation_overflow(
            source, data, beside=fp32_tensors(graph, fp16_blocklist(graph, means=False))
        ):
            return overflow
        parent, full, cast = (graph_logits(model, data) for model in (source.read_bytes(), target.read_bytes(), half))
    except ExportError as exc:
        return str(exc)
    before, after = (float(np.abs(logits - parent).mean()) for logits in (full, cast))
    if not after <= _WORSE * before + _MARGIN * float(np.abs(parent).max()):
        return f"with FP16 the logits are {after:.3g} away from the FP32 network's, with FP32 {before:.3g}"
    target.write_bytes(half)
    return ""


class TensorRT(Target):
    """TensorRT on an NVIDIA GPU, which sums 8-bit products exactly; the device builds the plan."""

    name = "tensorrt-onnx"
    title = "TensorRT"
    engine = None
    runs_on_cpu = False

    def _quantizer(self, source: Path, inputs: UInt8Array, config: QuantizationConfig, *, batch: int) -> Quantizer:
        return TensorRTQuantizer(source, inputs, config, batch=batch)

    def emit_qdq(self, model: onnx.ModelProto, folder: Path, inputs: UInt8Array, *, batch: int = 1) -> Path:
        """Write the QDQ graph, the floating-point part in FP16; see `Target.emit_qdq`."""
        path = folder / self.model_name
        with tempfile.TemporaryDirectory(prefix="edgefg-") as scratch:
            source = Path(scratch) / "float.onnx"
            source.write_bytes(without_pairs(model).SerializeToString())
            path.write_bytes(model.SerializeToString())
            _log.info(finish(source, path, inputs, batch=batch))
        return path
