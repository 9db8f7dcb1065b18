"""QDQ graphs: an FP32 ONNX graph with QuantizeLinear/DequantizeLinear pairs, by ONNX Runtime's quantiser.

Shared by the targets that read ONNX; each names the operators that it quantises and the quantiser's options. Ranges
come from `edgefg.export.quantize.calibrators`, bias correction from `edgefg.export.quantize.bias_correction`.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from pathlib import Path
from typing import Any, ClassVar, Literal

import onnx

from edgefg.artifact.folder import STEM
from edgefg.errors import ExportError, one_line
from edgefg.export.onnx.graph import Graph
from edgefg.export.onnx.rules import skip_tensors
from edgefg.export.quantize.bias_correction import correct_biases
from edgefg.export.quantize.calibrators import calibrate
from edgefg.export.quantize.quantizer import LAYERS, Quantizer
from edgefg.quiet import quiet

# How many images a layer's mean output is taken over.
_BIAS_IMAGES = 32


class QDQQuantizer(Quantizer):
    """Writes QDQ ONNX files, one step of ONNX Runtime's quantiser at a time.

    ``quantize_static`` would hold every activation of every image in memory for histograms, and cannot quantise single
    tensors.
    """

    activations: ClassVar[Literal["QInt8", "QUInt8"]]
    """Type of quantised activations. ``QInt8`` is symmetric around zero."""
    op_types: ClassVar[tuple[str, ...]]
    """Operators whose inputs and outputs are quantised."""
    options: ClassVar[dict[str, Any]]
    """The quantiser's ``extra_options``."""
    quantizes_skips: ClassVar[bool] = False
    """Whether the skip of every residual sum takes a pair."""

    @functools.cached_property
    def ranges(self) -> Any:
        """Ranges of the activations, as ONNX Runtime's `TensorsData`. They do not depend on the layers kept."""
        # "Add" for the skips, which are quantised tensor by tensor.
        op_types = [*self.op_types, "Add"]
        symmetric = self.activations == "QInt8"
        return calibrate(self.source, self._data, self.config.calibrator, op_types, symmetric=symmetric)

    def _write(self, folder: Path, keep: Collection[str], *, layers_only: bool) -> Path:
        path = folder / f"{STEM}.onnx"
        try:
            model = onnx.shape_inference.infer_shapes(onnx.load(self.source))
            if self.config.bias_correction and not layers_only:
                images = max(1, _BIAS_IMAGES // len(self._data[0]))
                model = correct_biases(
                    model, lambda own: self._quantise(own, keep, QuantizeBias=False), self._data[:images]
                )
            quantised = self._quantise(model, keep, layers_only=layers_only)
        except ExportError:
            raise
        except Exception as exc:  # ONNX Runtime raises a family of its own and Python's
            raise ExportError(f"ONNX Runtime could not quantise the graph: {one_line(exc)[:300] or repr(exc)}") from exc
        path.write_bytes(quantised.SerializeToString())
        return path

    def _quantise(
        self, source: onnx.ModelProto, keep: Collection[str], *, layers_only: bool = False, **options: Any
    ) -> onnx.ModelProto:
        """Return a graph with Q/DQ pairs by the calibrated ranges; the graph and the ranges are not changed."""
        from onnxruntime.quantization import QDQQuantizer as OnnxRuntimeQuantizer
        from onnxruntime.quantization import QuantType
        from onnxruntime.quantization.calibrate import TensorsData

        reduce_range, ranges = bool(self.config.reduce_range), self.ranges
        options = {**self.options, **options}
        if keep:  # no pair stands before a kept layer but those of other readers
            options["OpTypesToExcludeOutputQuantization"] = ["Conv", "Gemm"]
        if reduce_range:
            options["TensorQuantOverrides"] = _wide_depthwise_weights(source)
        model = onnx.ModelProto()
        model.CopyFrom(source)
        with quiet():
            quantizer = OnnxRuntimeQuantizer(
                model,
                per_channel=True,
                reduce_range=reduce_range,
                weight_qType=QuantType.QInt8,
                activation_qType=QuantType[self.activations],
                tensors_range=TensorsData(ranges.calibration_method, dict(ranges.items())),
                nodes_to_quantize=[],
                nodes_to_exclude=[*_convolutions_behind_pad(model), *keep, *_feeding(model, keep)],
                op_types_to_quantize=[name for name in self.op_types if not layers_only or name in self.layer_ops],
                extra_options=options,
            )
            if self.quantizes_skips and not layers_only:
                for name in skip_tensors(model, keep):
                    quantizer.quantize_activation_tensor(name)
            quantizer.quantize_model()
        quantizer.model.topological_sort()
        quantised: onnx.ModelProto = quantizer.model.model
        return quantised


def _feeding(model: onnx.ModelProto, layers: Collection[str]) -> list[str]:
    """Name the nodes between a kept layer and the preceding layer or sum.

    Q/DQ pairs there would round the layer's input.
    """
    graph = Graph(model)
    found = []
    for node in graph.nodes:
        tensor = node.input[0] if node.name in layers else ""
        while (writer := graph.writer(tensor)) is not None and writer.op_type not in LAYERS:
            found.append(writer.name)
            data = [name for name in writer.input if name not in graph.constants]
            tensor = data[0] if len(data) == 1 else ""
    return found


def _wide_depthwise_weights(model: onnx.ModelProto) -> dict[str, Any]:
    """Return overrides that leave depthwise weights all 8 bits, since no CPU sums their few products in pairs."""
    graph = Graph(model)
    depthwise = [
        node.input[1]
        for node in graph.nodes
        if node.op_type == "Conv" and node.input[1] in graph.constants and graph.constants[node.input[1]].dims[1] == 1
    ]
    return {name: [{"axis": 0, "reduce_range": False}] for name in depthwise}


def _convolutions_behind_pad(model: onnx.ModelProto) -> list[str]:
    """Name the convolutions that read a Pad which could not be folded: Q/DQ between the two is refused."""
    padded = {name for node in model.graph.node if node.op_type == "Pad" for name in node.output}
    return [node.name for node in model.graph.node if node.op_type == "Conv" and node.input[0] in padded]
