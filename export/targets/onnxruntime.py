"""ONNX Runtime: plain ONNX; INT8 as a QDQ graph with uint8 activations, int8 weights per channel and int32 biases.

ONNX Runtime computes FP16 graphs in FP32 on a CPU, so FP16 is not offered.
"""

from __future__ import annotations

from pathlib import Path

from edgefg.export.quantize.qdq import QDQQuantizer
from edgefg.export.quantize.quantizer import Quantizer
from edgefg.export.targets.target import Target
from edgefg.preprocess import UInt8Array
from edgefg.settings.quantization import QuantizationConfig


class ONNXRuntimeQuantizer(QDQQuantizer):
    """Writes the QDQ ONNX that ONNX Runtime's CPU provider runs best."""

    target = "onnx"
    activations = "QUInt8"
    # What the CPU kernels run in 8 bits. Others stay in floating point between dequantised tensors.
    op_types = (
        "Add", "AveragePool", "Clip", "Concat", "Conv", "Flatten", "Gemm", "GlobalAveragePool", "MatMul", "MaxPool",
        "Mul", "Relu", "Reshape", "Sigmoid",
    )  # fmt: skip
    # The logits stay in floating point: 256 steps over all classes would blur neighbours.
    options = {"WeightSymmetric": True, "OpTypesToExcludeOutputQuantization": ["Gemm"]}  # noqa: RUF012


class ONNXRuntime(Target):
    """ONNX Runtime on a CPU."""

    name = "onnx"
    title = "ONNX Runtime"
    precisions = ("fp32", "int8")

    def _quantizer(self, source: Path, inputs: UInt8Array, config: QuantizationConfig, *, batch: int) -> Quantizer:
        return ONNXRuntimeQuantizer(source, inputs, config, batch=batch)
