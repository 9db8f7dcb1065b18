"""The interface of a deployment target: its rules, and how a model file is written for it."""

from __future__ import annotations

import abc
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, get_args

import onnx
from msgspec.structs import replace

from edgefg.artifact.folder import STEM
from edgefg.errors import ExportError
from edgefg.export.onnx.fp16 import to_half
from edgefg.export.quantize.pairs import QuantParams, activation_params, with_integer_weights
from edgefg.export.quantize.quantizer import Quantizer, lacks_vnni
from edgefg.log import get_logger
from edgefg.preprocess import UInt8Array
from edgefg.settings.quantization import Calibrator, Precision, QuantizationConfig, TargetName, WeightBits

_log = get_logger(__name__)


class Target(abc.ABC):
    """A deployment target. Subclasses without state, one object each, see `edgefg.export.targets.TARGETS`.

    The defaults are those of a target that reads an ONNX file.
    """

    name: ClassVar[TargetName]
    title: ClassVar[str]
    """Name for people, such as "ONNX Runtime"."""
    engine: ClassVar[str | None] = "onnxruntime"
    """Distribution that runs the model file on a workstation; None if a device has to build a plan first."""
    suffix: ClassVar[str] = ".onnx"
    """Suffix of the model file."""
    precisions: ClassVar[tuple[Precision, ...]] = get_args(Precision)
    calibrators: ClassVar[tuple[Calibrator, ...]] = get_args(Calibrator)
    runs_on_cpu: ClassVar[bool] = True
    """Whether the model runs on CPUs, where 8-bit weights may overflow; 7-bit weights are for these only."""
    saturates: ClassVar[bool] = False
    """Whether 8-bit weights give wrong sums on a CPU without VNNI, so that it measures other logits than others do."""
    folds_scale: ClassVar[bool] = False
    """Whether the engine folds the normalisation's division into the first convolution before it quantises."""

    @property
    def model_name(self) -> str:
        """File name of the model."""
        return f"{STEM}{self.suffix}"

    def weight_bits(self, config: QuantizationConfig) -> WeightBits:
        """Return the width of INT8 weights: as asked for or, if nothing was, 7 bits if this CPU lacks VNNI.

        Without VNNI, OpenVINO saturates with 8 bits, and ONNX Runtime (see `edgefg.runtimes.onnxruntime.EXACT_SUMS`)
        is no faster than in FP32.
        """
        reduced = lacks_vnni() if config.reduce_range is None else config.reduce_range
        return 7 if self.runs_on_cpu and reduced else 8

    def decide_range(self, config: QuantizationConfig) -> QuantizationConfig:
        """Return the settings with ``reduce_range`` decided; say so if 7 bits were not asked for."""
        bits = self.weight_bits(config)
        if bits == 7 and config.reduce_range is None:
            _log.info(
                "this CPU lacks VNNI: weights take 7 bits, since OpenVINO saturates with 8 here and ONNX Runtime is"
                " slow; --no-reduce-range takes 8"
            )
        return replace(config, reduce_range=bits == 7)

    def check(self, precision: Precision, config: QuantizationConfig) -> None:
        """Raise `ExportError` if the target does not support what is asked for."""
        if precision not in self.precisions:
            raise ExportError(
                f"--precision {precision} is not available for {self.title} (--to {self.name})."
                f" Use {' or '.join(self.precisions)}."
            )
        if config.calibrator not in self.calibrators:
            raise ExportError(
                f"--calibrator {config.calibrator} is not available for {self.title} (--to {self.name})."
                f" Use one of {', '.join(self.calibrators)}."
            )
        if config.reduce_range and not self.runs_on_cpu:
            raise ExportError(f"--reduce-range is for CPUs only. Remove it for --to {self.name}.")

    def emit(self, source: Path, folder: Path) -> Path:
        """Write an ONNX file as the target's model file, arithmetic unchanged, and return its path.

        Raises:
            ExportError: the graph cannot be converted, or the file cannot be written.
        """
        path = folder / self.model_name
        path.write_bytes(source.read_bytes())
        return path

    def emit_fp16(self, source: Path, folder: Path, data: Sequence[UInt8Array]) -> Path:
        """Write the FP16 form of an FP32 ONNX file as the target's model file and return its path.

        Args:
            source: takes ``uint8 [batch, height, width, 3]``.
            folder: where to write.
            data: batches of images to look for activations beyond FP16's range.

        Raises:
            ExportError: a weight or an activation is beyond FP16's range, or a converter failed.
        """
        with tempfile.TemporaryDirectory(prefix="edgefg-") as scratch:
            half = Path(scratch) / "half.onnx"
            to_half(source, half, data)
            return self.emit(half, folder)

    def emit_qdq(self, model: onnx.ModelProto, folder: Path, inputs: UInt8Array, *, batch: int = 1) -> Path:
        """Write a QDQ graph whose quantisers were trained as the target's model file and return its path.

        Args:
            model: QDQ graph of ``uint8 [batch, height, width, 3]``, weights in floating point.
            folder: where to write.
            inputs: ``uint8 [K, height, width, 3]`` RGB, for targets that compare FP16 with FP32.
            batch: the graph's fixed batch size; 0 if it is free.

        Raises:
            ExportError: the graph cannot be converted.
        """
        with tempfile.TemporaryDirectory(prefix="edgefg-") as scratch:
            source = Path(scratch) / "qdq.onnx"
            source.write_bytes(with_integer_weights(model).SerializeToString())
            return self.emit(source, folder)

    def quantizer(self, source: Path, inputs: UInt8Array, config: QuantizationConfig, *, batch: int = 1) -> Quantizer:
        """Return what writes INT8 model files of an FP32 graph for this target.

        Args:
            source: FP32 ONNX of ``uint8 [batch, height, width, 3]``; it must stay where it is.
            inputs: calibration images, ``uint8 [K, height, width, 3]`` RGB.
            config: how to quantise.
            batch: the graph's fixed batch size; 0 if it is free.
        """
        decided = replace(config, reduce_range=self.weight_bits(config) == 7)
        return self._quantizer(source, inputs, decided, batch=batch)

    @abc.abstractmethod
    def _quantizer(self, source: Path, inputs: UInt8Array, config: QuantizationConfig, *, batch: int) -> Quantizer:
        """Return the target's quantiser; ``config.reduce_range`` is decided."""

    def activation_params(self, model: Path) -> dict[str, QuantParams]:
        """Return the parameters of the quantised activations of an INT8 model file by the name of the tensor.

        Training quantises in the same places and ranges.

        Raises:
            ExportError: training cannot imitate a quantiser of the file.
        """
        return activation_params(onnx.load(model))
