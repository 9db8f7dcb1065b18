"""FP32 → INT8, one graph for each engine from the same calibration inputs.

* OpenVINO: NNCF on the OpenVINO model, MIXED preset (symmetric weights, asymmetric activations), fast bias correction.
* TensorRT: explicit QDQ ONNX, all int8 symmetric, float bias, Q/DQ where TensorRT fuses it
  (`edgefg.export.onnx.rules`), the rest in FP16.
* ONNX Runtime: QDQ ONNX, uint8 activations, int8 weights for each channel, int32 bias.

8-bit weights saturate in the 16-bit sums of x86 CPUs without VNNI. With ImageNet's EfficientNet-Lite0 (1,000 classes,
96 calibration images), OpenVINO keeps FP32's class of 94 % of 296 grocery photographs with VNNI and of 54 % without it
(held to AVX2 by ONEDNN_MAX_CPU_ISA), far beyond a golden set's tolerance. ``any_cpu`` halves the weights' range: 87 %
on both.

Ranges come from `edgefg.export.quantize.calibrators`, the correction of biases from
`edgefg.export.quantize.bias_correction`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx

from edgefg.data.calibration import batches
from edgefg.errors import ExportError, one_line
from edgefg.export.onnx.fp16 import activation_overflow, rest_to_half
from edgefg.export.onnx.fp16_blocklist import apart, sensitive
from edgefg.export.onnx.graph import Graph
from edgefg.export.onnx.rules import FULL_PRECISION, INPUT, broken_rules, skip_tensors
from edgefg.export.onnx.session import open_session
from edgefg.export.quantize.bias_correction import correct_biases
from edgefg.export.quantize.calibrators import Calibrator, calibrate
from edgefg.export.quantize.nncf_ranges import range_parameters
from edgefg.preprocess import UInt8Array
from edgefg.quiet import quiet

# How many calibration images tell whether a network bears FP16, and how far FP16 may move its logits away from the FP32
# network's: as a multiple of the deviation that int8 makes alone, and as a share of the greatest logit.
_COMPARED = 16
_WORSE = 1.5
_MARGIN = 0.01
# How many images a layer's mean output is taken over.
_BIAS_IMAGES = 32
LAYERS = ("Conv", "Gemm", "MatMul")
"""Operators with weights, which are quantised, or kept, one by one."""
_TENSORRT_OPS = ["Conv", "Gemm"]
_TENSORRT_OPTIONS: dict[str, Any] = {
    "ActivationSymmetric": True,
    "WeightSymmetric": True,
    "AddQDQPairToWeight": True,
    "QuantizeBias": False,
    "OpTypesToExcludeOutputQuantization": _TENSORRT_OPS,
}
# What ONNX Runtime's CPU kernels run in 8 bits; others stay in floating point between dequantised tensors.
_ONNXRUNTIME_OPS = [
    "Add", "AveragePool", "Clip", "Concat", "Conv", "Flatten", "Gemm", "GlobalAveragePool", "MatMul", "MaxPool", "Mul",
    "Relu", "Reshape", "Sigmoid",
]  # fmt: skip
# The logits stay in floating point: 256 steps over all classes would blur neighbours.
_ONNXRUNTIME_OPTIONS: dict[str, Any] = {"WeightSymmetric": True, "OpTypesToExcludeOutputQuantization": ["Gemm"]}
# So that no pair stands before a layer that is kept but those of other readers.
_NO_OUTPUT_PAIRS = {"OpTypesToExcludeOutputQuantization": ["Conv", "Gemm"]}
_OPENVINO_LAYERS = ("Convolution", "GroupConvolution", "MatMul")


def quantize_openvino(
    model: Any,
    inputs: UInt8Array,
    *,
    batch: int = 1,
    calibrator: Calibrator = "minmax",
    any_cpu: bool = False,
    bias_correction: bool = False,
    keep: Collection[str] = (),
    layers_only: bool = False,
) -> Any:
    """Quantise an `openvino.Model` with NNCF and return the new model.

    Args:
        model: FP32, takes ``uint8 [batch, height, width, 3]``.
        inputs: ``uint8 [K, height, width, 3]`` RGB.
        batch: the model's fixed batch size; 0 where it is free.
        calibrator: see `edgefg.export.quantize.calibrators`.
        any_cpu: 7-bit weights, for CPUs that would saturate with 8.
        bias_correction: NNCF's correction layer by layer instead of its fast one, which is always there.
        keep: names of the ONNX graph's layers that stay in floating point.
        layers_only: leave every operator without weights in floating point too.

    Raises:
        ExportError: NNCF cannot quantise the model.
    """
    data = batches(inputs, batch or 1)
    try:
        with quiet(), range_parameters(calibrator) as ranges:
            import nncf

            overflow = nncf.quantization.advanced_parameters.OverflowFix
            return nncf.quantize(
                model,
                nncf.Dataset(data),
                preset=nncf.QuantizationPreset.MIXED,
                subset_size=len(data),
                fast_bias_correction=not bias_correction,
                ignored_scope=_ignored(model, keep, layers_only),
                advanced_parameters=nncf.AdvancedQuantizationParameters(
                    activations_range_estimator_params=ranges,
                    overflow_fix=overflow.ENABLE if any_cpu else overflow.DISABLE,
                ),
            )
    except Exception as exc:  # NNCF raises a family of its own, OpenVINO RuntimeError
        raise ExportError(f"NNCF could not quantise the network: {one_line(exc)[:300]}") from exc


def _ignored(model: Any, keep: Collection[str], layers_only: bool) -> Any:
    """Return what NNCF is to leave in floating point."""
    import nncf

    if not keep and not layers_only:
        return nncf.IgnoredScope()
    # Of a layer with a bias OpenVINO makes an operation without, under this name, and an addition.
    wanted = {name for layer in keep for name in (layer, f"{layer}/WithoutBiases")}
    kinds = {op.get_friendly_name(): op.get_type_name() for op in model.get_ops()}
    names = [name for name, kind in kinds.items() if kind in _OPENVINO_LAYERS and name in wanted]
    others = sorted(set(kinds.values()) - set(_OPENVINO_LAYERS)) if layers_only else []
    return nncf.IgnoredScope(names=names, types=others, validate=False)


def quantize_tensorrt(
    source: Path,
    target: Path,
    inputs: UInt8Array,
    *,
    batch: int = 1,
    calibrator: Calibrator = "minmax",
    bias_correction: bool = False,
    keep: Collection[str] = (),
    layers_only: bool = False,
    ranges: Any = None,
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
        calibrator: see `edgefg.export.quantize.calibrators`.
        bias_correction: take off the biases what quantisation shifts, see `edgefg.export.quantize.bias_correction`.
        keep: names of the layers that stay in floating point.
        layers_only: put no pair on residual skips either.
        ranges: those of `activation_ranges`, where they are at hand; they are found anew otherwise.

    Returns:
        Why what stays floating point is FP32, in one line, which the file's metadata say too; empty where it is FP16.

    Raises:
        ExportError: ONNX Runtime cannot quantise the graph.
    """
    how = _How("QInt8", _TENSORRT_OPS, _TENSORRT_OPTIONS, calibrator, bias_correction, keep, skips=not layers_only)
    _quantize_onnx(source, target, batches(inputs, batch or 1), how, ranges)
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
    graph = Graph(onnx.load(source))
    try:
        half = rest_to_half(onnx.load(target)).SerializeToString()
        if overflow := activation_overflow(source, data, beside=apart(graph, sensitive(graph, means=False))):
            return overflow
        parent, full, cast = (graph_logits(model, data) for model in (source.read_bytes(), target.read_bytes(), half))
    except ExportError as exc:
        return str(exc)
    before, after = (float(np.abs(logits - parent).mean()) for logits in (full, cast))
    if not after <= _WORSE * before + _MARGIN * float(np.abs(parent).max()):
        return f"with FP16 the logits are {after:.3g} away from the FP32 network's, with FP32 {before:.3g}"
    target.write_bytes(half)
    return ""


def graph_logits(model: bytes, data: Sequence[UInt8Array], *, optimise: bool = True) -> npt.NDArray[np.float32]:
    """Return the logits, ``float32 [N, classes]``, that ONNX Runtime computes of a serialised graph.

    Args:
        model: takes ``uint8 [batch, height, width, 3]``.
        data: batches of it.
        optimise: see `open_session`.

    Raises:
        ExportError: it cannot run the graph.
    """
    try:
        session = open_session(model, optimise=optimise)
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
    bias_correction: bool = False,
    keep: Collection[str] = (),
    layers_only: bool = False,
    ranges: Any = None,
) -> None:
    """Write the QDQ ONNX that ONNX Runtime's CPU provider runs best.

    ``any_cpu`` takes 7-bit weights, for CPUs that would saturate with 8; ``layers_only`` leaves every operator without
    weights in floating point; other arguments as `quantize_tensorrt`.
    """
    op_types = [name for name in _ONNXRUNTIME_OPS if not layers_only or name in LAYERS]
    how = _How("QUInt8", op_types, _ONNXRUNTIME_OPTIONS, calibrator, bias_correction, keep, reduce_range=any_cpu)
    _quantize_onnx(source, target, batches(inputs, batch or 1), how, ranges)


def activation_ranges(
    to: Literal["onnx", "tensorrt-onnx"],
    source: Path,
    inputs: UInt8Array,
    *,
    batch: int = 1,
    calibrator: Calibrator = "minmax",
) -> Any:
    """Return the ranges that `quantize_onnxruntime` or `quantize_tensorrt` would find, to be given to several calls."""
    op_types = _ONNXRUNTIME_OPS if to == "onnx" else _TENSORRT_OPS
    # "Add" for the skips, which TensorRT's graph quantises tensor by tensor.
    return calibrate(
        source, batches(inputs, batch or 1), calibrator, [*op_types, "Add"], symmetric=to == "tensorrt-onnx"
    )


class _How(NamedTuple):
    """What ONNX Runtime's quantiser is told."""

    activations: Literal["QInt8", "QUInt8"]
    op_types: Sequence[str]
    options: dict[str, Any]
    calibrator: Calibrator
    bias_correction: bool
    keep: Collection[str]
    reduce_range: bool = False
    skips: bool = False
    """Whether residual skips take a pair."""

    @property
    def symmetric(self) -> bool:
        return self.activations == "QInt8"


def _quantize_onnx(source: Path, target: Path, data: Sequence[UInt8Array], how: _How, ranges: Any) -> None:
    """Calibrate and quantise with ONNX Runtime's own tools, one step at a time.

    ``quantize_static`` would hold every activation of every image in memory for histograms, and cannot be told to
    quantise single tensors.
    """
    try:
        model = onnx.shape_inference.infer_shapes(onnx.load(source))
        if ranges is None:
            ranges = calibrate(source, data, how.calibrator, [*how.op_types, "Add"], symmetric=how.symmetric)
        if how.bias_correction:
            probed = how._replace(options={**how.options, "QuantizeBias": False})
            images = max(1, _BIAS_IMAGES // len(data[0]))
            model = correct_biases(model, lambda own: _write_pairs(own, ranges, probed), data[:images])
        quantised = _write_pairs(model, ranges, how)
    except ExportError:
        raise
    except Exception as exc:  # ONNX Runtime raises a family of its own and Python's
        raise ExportError(f"ONNX Runtime could not quantise the graph: {one_line(exc)[:300] or repr(exc)}") from exc
    target.write_bytes(quantised.SerializeToString())


def _write_pairs(source: onnx.ModelProto, ranges: Any, how: _How) -> onnx.ModelProto:
    """Return a graph with Q/DQ pairs by calibrated ranges; the graph and the ranges are not changed."""
    from onnxruntime.quantization import QDQQuantizer, QuantType
    from onnxruntime.quantization.calibrate import TensorsData

    model = onnx.ModelProto()
    model.CopyFrom(source)
    with quiet():
        quantizer = QDQQuantizer(
            model,
            per_channel=True,
            reduce_range=how.reduce_range,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType[how.activations],
            tensors_range=TensorsData(ranges.calibration_method, dict(ranges.items())),
            nodes_to_quantize=[],
            nodes_to_exclude=[*_convolutions_behind_pad(model), *how.keep, *_feeding(model, how.keep)],
            op_types_to_quantize=list(how.op_types),
            extra_options={**how.options, **_wide_weights(model, how), **(_NO_OUTPUT_PAIRS if how.keep else {})},
        )
        if how.skips:
            for name in skip_tensors(model, how.keep):
                quantizer.quantize_activation_tensor(name)
        quantizer.quantize_model()
    quantizer.model.topological_sort()
    quantised: onnx.ModelProto = quantizer.model.model
    return quantised


def _wide_weights(model: onnx.ModelProto, how: _How) -> dict[str, Any]:
    """Return the option that leaves depthwise weights all 8 bits, whose few products no CPU sums in pairs."""
    if not how.reduce_range:
        return {}
    graph = Graph(model)
    depthwise = [
        node.input[1]
        for node in graph.nodes
        if node.op_type == "Conv" and node.input[1] in graph.constants and graph.constants[node.input[1]].dims[1] == 1
    ]
    return {"TensorQuantOverrides": {name: [{"axis": 0, "reduce_range": False}] for name in depthwise}}


def _feeding(model: onnx.ModelProto, layers: Collection[str]) -> list[str]:
    """Name what lies between layers and the layer or residual sum that they read: its pairs would round their input."""
    graph = Graph(model)
    found = []
    for node in graph.nodes:
        tensor = node.input[0] if node.name in layers else ""
        while (writer := graph.writer(tensor)) is not None and writer.op_type not in LAYERS:
            found.append(writer.name)
            data = [name for name in writer.input if name not in graph.constants]
            tensor = data[0] if len(data) == 1 else ""
    return found


def _convolutions_behind_pad(model: onnx.ModelProto) -> list[str]:
    """Name the convolutions that read a Pad which could not be folded: Q/DQ between the two is refused."""
    padded = {name for node in model.graph.node if node.op_type == "Pad" for name in node.output}
    return [node.name for node in model.graph.node if node.op_type == "Conv" and node.input[0] in padded]
