"""OpenVINO: IR (``.xml`` and ``.bin``); INT8 by NNCF on the OpenVINO model.

MIXED preset: symmetric weights, asymmetric activations. Biases are always corrected, fast or layer by layer.

8-bit weights saturate in the 16-bit sums of x86 CPUs without VNNI. With ImageNet's EfficientNet-Lite0 (1,000 classes,
96 calibration images), OpenVINO keeps FP32's class of 94 % of 296 grocery photographs with VNNI and of 54 % without it
(held to AVX2 by ONEDNN_MAX_CPU_ISA), far beyond a golden set's tolerance. 7-bit weights keep 87 % on both.

NNCF finds the ranges of activations with its own estimators, which differ from `edgefg.export.quantize.calibrators`:

* ``minmax``: the extremes over all images, the same. The mean over the images, NNCF's default, kept 67 % of the
  classes where the extremes kept 92 %.
* ``percentile``: 0.01 % of the values of *each image* (NNCF's default) are clipped on each side, and the range is the
  widest of all images. So a single image can set it. With the mean over the images, EfficientNet-Lite0 kept the class
  of 51 % of 100 grocery photographs, with the widest range 86 % and with the extremes 85 % (7-bit weights, 160 px).
* ``mse``: NNCF's histogram, whose search goes by quantiles and does not look at the whole range. Of a million values it
  drops a single outlier where the least error keeps half of its reach.
* ``entropy``: not available.

Inputs of depthwise convolutions have a range for each channel, for which ``mse`` takes the extremes.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from edgefg.artifact.folder import STEM
from edgefg.errors import ExportError, one_line
from edgefg.export.quantize.pairs import QuantParams
from edgefg.export.quantize.quantizer import Quantizer
from edgefg.export.targets.target import Target
from edgefg.log import get_logger
from edgefg.preprocess import UInt8Array
from edgefg.quiet import quiet
from edgefg.settings.quantization import Calibrator, QuantizationConfig

_log = get_logger(__name__)
_LAYERS = ("Convolution", "GroupConvolution", "MatMul")
_LEVELS = 256


def convert(onnx_path: Path) -> Any:
    """Convert an ONNX file to an `openvino.Model`. Raises `ExportError`."""
    try:
        with quiet():
            import openvino

            return openvino.convert_model(str(onnx_path))
    except Exception as exc:  # OpenVINO raises RuntimeError, its converter a family of its own
        raise ExportError(f"OpenVINO does not convert the ONNX graph: {one_line(exc)[:300]}") from exc


def write_ir(model: Any, path: Path) -> None:
    """Write an `openvino.Model` as ``path`` (``.xml``) and, beside it, its weights (``.bin``), in full precision.

    Raises:
        ExportError: the files cannot be written, for instance because the disk is full.
    """
    try:
        with quiet():
            import openvino

            openvino.save_model(model, str(path), compress_to_fp16=False)
    except RuntimeError as exc:
        raise ExportError(f"OpenVINO could not write the IR: {one_line(exc)[:300]}; is the disk full?") from exc
    weights = path.with_suffix(".bin")
    if not path.is_file() or not weights.is_file():
        raise ExportError(f"OpenVINO did not write {path.name} and {weights.name}; is the disk full?")


class OpenVINOQuantizer(Quantizer):
    """Writes INT8 IRs with NNCF, which finds the ranges again for every file."""

    target = "openvino"

    def _write(self, folder: Path, keep: Collection[str], *, layers_only: bool) -> Path:
        path = folder / f"{STEM}.xml"
        model = convert(self.source)
        try:
            with quiet():
                import nncf

                overflow = nncf.quantization.advanced_parameters.OverflowFix
                quantised = nncf.quantize(
                    model,
                    nncf.Dataset(self._data),
                    preset=nncf.QuantizationPreset.MIXED,
                    subset_size=len(self._data),
                    fast_bias_correction=layers_only or not self.config.bias_correction,
                    ignored_scope=_ignored(model, keep, layers_only),
                    advanced_parameters=nncf.AdvancedQuantizationParameters(
                        activations_range_estimator_params=_range_estimator(self.config.calibrator),
                        overflow_fix=overflow.ENABLE if self.config.reduce_range else overflow.DISABLE,
                    ),
                )
        except Exception as exc:  # NNCF raises a family of its own, OpenVINO RuntimeError
            raise ExportError(f"NNCF could not quantise the network: {one_line(exc)[:300]}") from exc
        write_ir(quantised, path)
        return path


def _range_estimator(calibrator: Calibrator) -> Any:
    """Return NNCF's range estimator that comes nearest to a calibrator; see the module."""
    from nncf.quantization import range_estimator as nncf

    if calibrator == "percentile":
        quantile = nncf.StatisticsType.QUANTILE
        low, high = (
            nncf.StatisticsCollectorParameters(statistics_type=quantile, aggregator_type=aggregator)
            for aggregator in (nncf.AggregatorType.MIN, nncf.AggregatorType.MAX)
        )
        return nncf.RangeEstimatorParameters(low, high)
    known = nncf.RangeEstimatorParametersSet
    return {"minmax": known.MINMAX, "mse": known.HISTOGRAM}[calibrator]


def _ignored(model: Any, keep: Collection[str], layers_only: bool) -> Any:
    """Return NNCF's scope of operations that stay in floating point."""
    import nncf

    if not keep and not layers_only:
        return nncf.IgnoredScope()
    # OpenVINO turns a layer with a bias into an operation without, under this name, and an addition.
    wanted = {name for layer in keep for name in (layer, f"{layer}/WithoutBiases")}
    kinds = {op.get_friendly_name(): op.get_type_name() for op in model.get_ops()}
    names = [name for name, kind in kinds.items() if kind in _LAYERS and name in wanted]
    others = sorted(set(kinds.values()) - set(_LAYERS)) if layers_only else []
    return nncf.IgnoredScope(names=names, types=others, validate=False)


class OpenVINO(Target):
    """OpenVINO on Intel CPUs and GPUs; FP16 is for the GPUs."""

    name = "openvino"
    title = "OpenVINO"
    engine = "openvino"
    suffix = ".xml"
    calibrators = ("minmax", "percentile", "mse")
    saturates = True
    folds_scale = True

    def emit(self, source: Path, folder: Path) -> Path:
        """Convert an ONNX file and write the IR; see `Target.emit`."""
        _log.info("converting to OpenVINO")
        path = folder / self.model_name
        write_ir(convert(source), path)
        return path

    def _quantizer(self, source: Path, inputs: UInt8Array, config: QuantizationConfig, *, batch: int) -> Quantizer:
        return OpenVINOQuantizer(source, inputs, config, batch=batch)

    def activation_params(self, model: Path) -> dict[str, QuantParams]:
        """Read the FakeQuantize operations of an IR; see `Target.activation_params`.

        Raises:
            ExportError: a tensor has lost its name in the ONNX graph, or is not quantised to 256 levels.
        """
        import openvino

        found = {}
        for operation in openvino.Core().read_model(model).get_ordered_ops():
            if operation.get_type_name() != "FakeQuantize":
                continue
            source = operation.input_value(0)
            names = sorted(source.get_names())
            if not names or operation.get_attributes()["levels"] != _LEVELS:
                where = names or source.get_node().get_friendly_name()
                raise ExportError(
                    f"the quantiser of {where} has {operation.get_attributes()['levels']} levels and {len(names)} names"
                    f" instead of {_LEVELS} and one. Update NNCF, or train for --to tensorrt-onnx."
                )
            low, high = (operation.input_value(i).get_node().data.astype(np.float32) for i in (1, 2))
            low, high = (limits.reshape(-1) if limits.size > 1 else limits.reshape(()) for limits in (low, high))
            scale = (high - low) / (_LEVELS - 1)
            found[names[0]] = _params(scale, np.round(-low / scale))
        return found


def _params(scale: Any, zero: Any) -> QuantParams:
    """Return the parameters of 256 levels from zero points counted from the lowest level; signed if symmetric."""
    if (zero == _LEVELS // 2).all():
        return QuantParams(scale, np.zeros(scale.shape, np.int8))
    return QuantParams(scale, zero.astype(np.uint8))
