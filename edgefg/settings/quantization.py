"""Settings of INT8 quantisation, and the names of targets, precisions and calibrators."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

TargetName = Literal["openvino", "onnx", "tensorrt-onnx"]
"""Deployment targets. `edgefg.export.targets` holds one object for each."""
Precision = Literal["fp32", "fp16", "int8"]
"""Arithmetic of an exported network."""
Calibrator = Literal["minmax", "percentile", "mse", "entropy"]
"""How the ranges of activations follow from the calibration images, see `edgefg.export.quantize.calibrators`."""
WeightBits = Literal[7, 8]
"""Width of INT8 weights. With 7 bits, pairs of products fit the 16-bit sums of x86 CPUs without VNNI."""


class QuantizationConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How a network is quantised to INT8."""

    calibrator: Annotated[
        Calibrator,
        Meta(
            description="How calibration finds the ranges of activations: extremes of all images, percentiles that clip"
            " 0.001 % of the values on each side (OpenVINO: 0.01 % of each image's values), least squared error, or"
            " least KL divergence. The last one is not for OpenVINO, and for comparisons only: it has cost"
            " EfficientNet-Lite0 44 points of top-1 on ImageNet."
        ),
    ] = "minmax"
    num_samples: Annotated[
        int, Meta(ge=1, description="Training images to calibrate with, balanced by class and recorded condition.")
    ] = 300
    reduce_range: Annotated[
        bool | None,
        Meta(
            description="Quantise weights to 7 bits so that int8 sums cannot overflow on x86 CPUs without VNNI."
            " Default: on if this CPU lacks VNNI."
        ),
    ] = None
    bias_correction: Annotated[
        bool,
        Meta(
            description="Correct biases for the shift that quantisation causes. For OpenVINO, NNCF does so by its slow,"
            " exact method."
        ),
    ] = False
    max_int8_drop: Annotated[
        Annotated[float, Meta(ge=0)] | None,
        Meta(
            description="Largest loss of top-1 against FP32 on validation images, in percentage points. The most"
            " sensitive layers stay in floating point until it holds. Default: no limit."
        ),
    ] = None
    keep_layers: Annotated[
        tuple[str, ...],
        Meta(description="Layer that stays in floating point, by its name in `edgefg sensitivity`; may be repeated."),
    ] = ()

    def changed(self) -> set[str]:
        """Return the names of the fields that differ from their defaults."""
        return {name for name in self.__struct_fields__ if getattr(self, name) != getattr(_DEFAULTS, name)}


_DEFAULTS = QuantizationConfig()
