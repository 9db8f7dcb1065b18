"""FP32 → INT8, one graph for each engine from the same calibration inputs.

* OpenVINO: NNCF on the OpenVINO model, MIXED preset (symmetric weights, asymmetric activations), fast bias correction.
* TensorRT: explicit QDQ ONNX, all int8 symmetric, float bias, Q/DQ where TensorRT fuses it (`edgefg.export.rules`), the
  rest in FP16.
* ONNX Runtime: QDQ ONNX, uint8 activations, int8 weights for each channel, int32 bias.

8-bit weights saturate in the 16-bit sums of x86 CPUs without VNNI. With ImageNet's EfficientNet-Lite0 (1,000 classes,
96 calibration images), OpenVINO keeps FP32's class of 94 % of 296 grocery photographs with VNNI and of 54 % without it
(held to AVX2 by ONEDNN_MAX_CPU_ISA), far beyond a golden set's tolerance. ``any_cpu`` halves the weights' range: 87 %
on both.

Entropy (KL) calibration is not offered: it costs EfficientNet-Lite0 44 points.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from tqdm import tqdm

from edgefg.errors import ExportError, one_line
from edgefg.export.calibration import batches
from edgefg.export.half import Batches, activation_overflow, rest_to_half
from edgefg.export.quiet import quiet
from edgefg.export.rules import FULL_PRECISION, INPUT, broken_rules, skip_tensors
from edgefg.preprocess import UInt8Array

Calibrator = Literal["minmax", "percentile"]
"""How activation ranges come from the calibration images.

``minmax``: the extremes over all images; ``percentile``: the 0.001th and 99.999th percentile, which drops outliers.
"""

_IMAGES_AT_ONCE = 4
# How many calibration images tell whether a network bears FP16, and how far FP16 may move its logits away from the FP32
# network's: as a multiple of the deviation that int8 makes alone, and as a share of the greatest logit.
_COMPARED = 16
_WORSE = 1.5
_MARGIN = 0.01
_TENSORRT_OPS = ["Conv", "Gemm"]
# What ONNX Runtime's CPU kernels run in 8 bits; others stay in floating point between dequantised tensors.
_ONNXRUNTIME_OPS = [
    "Add", "AveragePool", "Clip", "Concat", "Conv", "Flatten", "Gemm", "GlobalAveragePool", "MatMul", "MaxPool", "Mul",
    "Relu", "Reshape", "Sigmoid",
]  # fmt: skip


def quantize_openvino(
    model: Any, inputs: UInt8Array, *, batch: int = 1, calibrator: Calibrator = "minmax", any_cpu: bool = False
) -> Any:
    """Quantise an `openvino.Model` with NNCF and return the new model.

    Args:
        model: FP32, takes ``uint8 [batch, height, width, 3]``.
        inputs: ``uint8 [K, height, width, 3]`` RGB.
        batch: the model's fixed batch size; 0 where it is free.
        calibrator: see `Calibrator`.
        any_cpu: 7-bit weights, for CPUs that would saturate with 8.

    Raises:
        ExportError: NNCF cannot quantise the model.
    """
    data = batches(inputs, batch or 1)
    try:
        with quiet():
            import nncf

            estimators, advanced = nncf.quantization.range_estimator, nncf.quantization.advanced_parameters
            known = estimators.RangeEstimatorParametersSet
            ranges = known.MINMAX if calibrator == "minmax" else _nncf_percentile(estimators)
            return nncf.quantize(
                model,
                nncf.Dataset(data),
                preset=nncf.QuantizationPreset.MIXED,
                subset_size=len(data),
                fast_bias_correction=True,
                advanced_parameters=nncf.AdvancedQuantizationParameters(
                    activations_range_estimator_params=ranges,
                    overflow_fix=advanced.OverflowFix.ENABLE if any_cpu else advanced.OverflowFix.DISABLE,
                ),
            )
    except Exception as exc:  # NNCF raises a family of its own, OpenVINO RuntimeError
        raise ExportError(f"NNCF could not quantise the network: {one_line(exc)[:300]}") from exc


def _nncf_percentile(estimators: Any) -> Any:
    """Describe, in NNCF's terms, the least 0.001th and the greatest 99.999th percentile of all images.

    The mean over the images, as in NNCF's own presets, kept 67 % of the classes where the extremes kept 92 %.
    """
    quantile, order = estimators.StatisticsType.QUANTILE, estimators.AggregatorType
    low, high = (
        estimators.StatisticsCollectorParameters(
            statistics_type=quantile, aggregator_type=aggregator, quantile_outlier_prob=1e-5
        )
        for aggregator in (order.MIN, order.MAX)
    )
    return estimators.RangeEstimatorParameters(low, high)


def quantize_tensorrt(
    source: Path, target: Path, inputs: UInt8Array, *, batch: int = 1, calibrator: Calibrator = "minmax"
) -> str:
    """Write the QDQ ONNX that TensorRT reads, from an FP32 ONNX file.

    Q/DQ stand on the inputs of Conv and Gemm only, so that a convolution fuses with the activation or the residual Add
    behind it, and on the skip of every residual Add. What stays floating point is FP16, in which a strongly typed
    TensorRT network then computes it, unless the network does not bear that.

    Args:
        source: FP32 ONNX of ``uint8 [batch, height, width, 3]``.
        target: where to write.
        inputs: ``uint8 [K, height, width, 3]`` RGB.
        batch: the file's fixed batch size; 0 where it is free.
        calibrator: see `Calibrator`.

    Returns:
        Why what stays floating point is FP32, in one line, which the file's metadata say too; empty where it is FP16.

    Raises:
        ExportError: ONNX Runtime cannot quantise the graph.
    """
    options: dict[str, Any] = {
        "ActivationSymmetric": True,
        "WeightSymmetric": True,
        "AddQDQPairToWeight": True,
        "QuantizeBias": False,
        "OpTypesToExcludeOutputQuantization": _TENSORRT_OPS,
    }
    _quantize_onnx(source, target, batches(inputs, batch or 1), calibrator, _TENSORRT_OPS, "QInt8", options)
    return finish_tensorrt(source, target, inputs, batch=batch)


def finish_tensorrt(source: Path, target: Path, inputs: UInt8Array, *, batch: int = 1) -> str:
    """Cast what stays floating point in the QDQ ONNX ``target`` to FP16, and check the rules.

    Arguments, return value and errors as `quantize_tensorrt`; ``source`` is the same graph without pairs.
    """
    why_not = _rest_to_half(source, target, batches(inputs[:_COMPARED], batch or 1))
    model = onnx.load(target)
    if why_not:
        model.metadata_props.add(key=FULL_PRECISION, value=why_not)
        target.write_bytes(model.SerializeToString())
    if refused := [broken for broken in broken_rules(model) if broken.refused]:
        raise ExportError(f"TensorRT would refuse the quantised graph: {refused[0].render()}")
    return why_not


def _rest_to_half(source: Path, target: Path, data: Sequence[UInt8Array]) -> str:
    """Cast what stays floating point in ``target`` to FP16; return why not where the FP32 parent's logits are lost."""
    try:
        half = rest_to_half(onnx.load(target)).SerializeToString()
        if overflow := activation_overflow(source, data):
            return overflow
        parent, full, cast = (_logits(model, data) for model in (source.read_bytes(), target.read_bytes(), half))
    except ExportError as exc:
        return str(exc)
    before, after = (float(np.abs(logits - parent).mean()) for logits in (full, cast))
    if not after <= _WORSE * before + _MARGIN * float(np.abs(parent).max()):
        return f"with FP16 the logits are {after:.3g} away from the FP32 network's, with FP32 {before:.3g}"
    target.write_bytes(half)
    return ""


def _logits(model: bytes, data: Sequence[UInt8Array]) -> npt.NDArray[np.float32]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return np.concatenate([session.run(None, {INPUT: batch})[0] for batch in data])
    except Exception as exc:  # ONNX Runtime raises a family of its own, plain RuntimeError among them
        raise ExportError(f"ONNX Runtime cannot run the graph: {one_line(exc)[:300]}") from exc


def quantize_onnxruntime(
    source: Path,
    target: Path,
    inputs: UInt8Array,
    *,
    batch: int = 1,
    calibrator: Calibrator = "minmax",
    any_cpu: bool = False,
) -> None:
    """Write the QDQ ONNX that ONNX Runtime's CPU provider runs best.

    ``any_cpu`` takes 7-bit weights, for CPUs that would saturate with 8; other arguments as `quantize_tensorrt`.
    """
    # The logits stay in floating point: 256 steps over all classes would blur neighbours.
    options = {"WeightSymmetric": True, "OpTypesToExcludeOutputQuantization": ["Gemm"]}
    data = batches(inputs, batch or 1)
    _quantize_onnx(source, target, data, calibrator, _ONNXRUNTIME_OPS, "QUInt8", options, reduce_range=any_cpu)


def _quantize_onnx(
    source: Path, target: Path, data: Sequence[UInt8Array], calibrator: Calibrator, op_types: list[str],
    activations: Literal["QInt8", "QUInt8"], options: dict[str, Any],
    *, reduce_range: bool = False,
) -> None:  # fmt: skip
    """Calibrate and quantise with ONNX Runtime's own tools, one step at a time.

    ``quantize_static`` would hold every activation of every image in memory for histograms, and cannot be told to
    quantise single tensors.
    """
    from onnxruntime.quantization import QDQQuantizer, QuantType

    model = onnx.shape_inference.infer_shapes(onnx.load(source))
    symmetric = bool(options.get("ActivationSymmetric"))
    excluded = _convolutions_behind_pad(model)
    try:
        ranges = _calibrate(source, data, calibrator, [*op_types, "Add"], symmetric)
        with quiet():
            quantizer = QDQQuantizer(
                model,
                per_channel=True,
                reduce_range=reduce_range,
                weight_qType=QuantType.QInt8,
                activation_qType=QuantType[activations],
                tensors_range=ranges,
                nodes_to_quantize=[],
                nodes_to_exclude=excluded,
                op_types_to_quantize=op_types,
                extra_options=options,
            )
            if symmetric:
                for name in skip_tensors(model):
                    quantizer.quantize_activation_tensor(name)
            quantizer.quantize_model()
    except Exception as exc:  # ONNX Runtime raises a family of its own and Python's
        raise ExportError(f"ONNX Runtime could not quantise the graph: {one_line(exc)[:300] or repr(exc)}") from exc
    quantizer.model.topological_sort()
    target.write_bytes(quantizer.model.model.SerializeToString())


def _calibrate(
    source: Path, data: Sequence[UInt8Array], calibrator: Calibrator, op_types: list[str], symmetric: bool
) -> Any:
    from onnxruntime.quantization import CalibrationMethod, create_calibrator

    method = CalibrationMethod.Percentile if calibrator == "percentile" else CalibrationMethod.MinMax
    options = {"symmetric": symmetric and method is CalibrationMethod.Percentile}
    # Min-max reads two scalars a tensor; histograms read the activations, so only a few images go at a time.
    step = _IMAGES_AT_ONCE if method is CalibrationMethod.Percentile else len(data)
    with tempfile.TemporaryDirectory(prefix="edgefg-") as folder, quiet():
        tool = create_calibrator(source, op_types, str(Path(folder) / "augmented.onnx"), method, extra_options=options)
        reader = iter(tqdm(data, "calibrating", disable=None, leave=False))
        for _ in range(0, len(data), step):
            tool.collect_data(Batches(itertools.islice(reader, step)))
        return tool.compute_data()


def _convolutions_behind_pad(model: onnx.ModelProto) -> list[str]:
    """Name the convolutions that read a Pad which could not be folded: Q/DQ between the two is refused."""
    padded = {name for node in model.graph.node if node.op_type == "Pad" for name in node.output}
    return [node.name for node in model.graph.node if node.op_type == "Conv" and node.input[0] in padded]
