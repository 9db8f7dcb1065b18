"""Sensitivity of each layer to INT8: logits with only that layer quantised, compared with FP32.

    edgefg sensitivity runs/x/student.safetensors DATA --to tensorrt-onnx

The layer with the smallest signal-to-quantisation-noise ratio is the first one to keep in floating point.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from edgefg import runtime
from edgefg.data import load_dataset
from edgefg.data.calibration import batches, choose_balanced, read_calibration
from edgefg.errors import DataError
from edgefg.export.quantize.quantizer import MakesQuantizers, Quantizer
from edgefg.export.tracing.onnx_exporter import need_one_graph, write_onnx
from edgefg.preprocess import UInt8Array
from edgefg.progress import track
from edgefg.settings.quantization import QuantizationConfig, TargetName
from edgefg.training.checkpoint import load

_Floats = npt.NDArray[np.float32]
_QUANTIZATION = QuantizationConfig(num_samples=32)


class LayerSensitivity(msgspec.Struct, frozen=True):
    """The cost of quantising one layer and no other."""

    layer: str
    """Its node's name in the ONNX graph."""
    sqnr: float
    """Signal-to-quantisation-noise ratio of the logits, decibels; infinite, in JSON null, if they do not change."""
    mse: float
    """Mean squared error of the logits."""
    agreement: float
    """Share of images on which top-1 is FP32's."""


class Scan(msgspec.Struct, frozen=True):
    """The layers of a network, the most sensitive first."""

    to: TargetName
    images: int
    """How many images were compared."""
    layers: tuple[LayerSensitivity, ...]

    def render(self) -> str:
        """Return a table."""
        width = max(len(row.layer) for row in self.layers)
        rows = [f"{row.layer:{width}}{row.sqnr:9.1f}{row.mse:12.3g}{row.agreement:11.1%}" for row in self.layers]
        head = f"{'layer':{width}}{'SQNR dB':>9}{'MSE':>12}{'agreement':>11}"
        return "\n".join([f"{self.to}, {self.images} images, one layer at a time in INT8, worst first", head, *rows])


def sensitivity(
    checkpoint: Path,
    data: Path,
    target: MakesQuantizers,
    *,
    compared: int = 64,
    quantization: QuantizationConfig = _QUANTIZATION,
    seed: int = 0,
    skip_corrupt: bool = False,
) -> Scan:
    """Scan a checkpoint's layers on images of the data set that it was trained on.

    Args:
        checkpoint: ``.safetensors`` of a teacher, a student or a pruned student.
        data: the data set. Training images calibrate, validation images are compared.
        target: the target whose INT8 is scanned.
        compared: how many images are compared, balanced by class.
        quantization: calibrator, number of calibration images and weight range.
        seed: seed of the choice of images.
        skip_corrupt: leave unreadable images out instead of raising.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        DataError: the data are not the checkpoint's, or have no validation images.
        ExportError: the network cannot be exported or quantised.
    """
    network, header = load(checkpoint)
    need_one_graph(network, header, checkpoint, "scan")
    loaded = load_dataset(data, expected=header, skip_corrupt=skip_corrupt)
    if not loaded.splits["val"]:
        raise DataError(f"{data} has no validation images. The scan needs some to compare INT8 with FP32 on.")
    chosen = (
        choose_balanced(loaded.splits[split], count, seed, loaded.conditions)
        for split, count in (("train", quantization.num_samples), ("val", compared))
    )
    calibrating, comparing = (read_calibration(paths, header.input).inputs for paths in chosen)
    with tempfile.TemporaryDirectory(prefix="edgefg-") as scratch:
        source = Path(scratch) / "fp32.onnx"
        write_onnx(network, header.input, source)
        return scan(target.quantizer(source, calibrating, quantization), comparing)


def scan(quantizer: Quantizer, inputs: UInt8Array) -> Scan:
    """Quantise one layer at a time and compare the logits with FP32's.

    Args:
        quantizer: writes INT8 model files of the network.
        inputs: images to compare on, ``uint8 [K, height, width, 3]`` RGB.

    Raises:
        ExportError: a layer cannot be quantised.
    """
    data = batches(inputs, quantizer.batch or 1)
    expected = np.concatenate(list(file_logits(quantizer.source, data)))[: len(inputs)]
    rows = []
    with tempfile.TemporaryDirectory(prefix="edgefg-") as scratch:
        for layer in track(quantizer.layers, "scanning layers"):
            model = quantizer.write_single(Path(scratch), layer)
            found = np.concatenate(list(file_logits(model, data)))[: len(inputs)]
            rows.append(_compare(layer, found, expected))
    return Scan(quantizer.target, len(inputs), tuple(sorted(rows, key=lambda row: row.sqnr)))


def file_logits(model: Path, data: Iterable[UInt8Array]) -> Iterator[_Floats]:
    """Yield the logits, ``float32 [batch, classes]``, of a model file for each batch."""
    opened = runtime.load(model)
    try:
        for batch in data:
            yield opened.infer(batch)
    finally:
        opened.close()


def _compare(layer: str, found: _Floats, expected: _Floats) -> LayerSensitivity:
    noise = float(np.square(found.astype(np.float64) - expected).mean())
    signal = float(np.square(expected.astype(np.float64)).mean())
    return LayerSensitivity(
        layer=layer,
        sqnr=10 * float(np.log10(signal / noise)) if noise else float("inf"),
        mse=noise,
        agreement=float((found.argmax(1) == expected.argmax(1)).mean()),
    )
