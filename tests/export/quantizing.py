"""INT8 files for tests, by the targets' own quantisers; 8-bit weights, whatever this CPU has."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from edgefg import runtime
from edgefg.export.quantize.quantizer import Quantizer
from edgefg.export.targets import target_of
from edgefg.preprocess import UInt8Array
from edgefg.settings.quantization import QuantizationConfig


def quantizer_of(to: str, source: Path, inputs: UInt8Array, *, batch: int = 1, **config: Any) -> Quantizer:
    """A target's quantiser of an FP32 graph; ``config`` are fields of `QuantizationConfig`."""
    settings = QuantizationConfig(**{"reduce_range": False, **config})
    return target_of(to).quantizer(source, inputs, settings, batch=batch)


def quantize_onnxruntime(source: Path, path: Path, inputs: UInt8Array, **options: Any) -> None:
    """Write ONNX Runtime's INT8 file at any path."""
    _write(quantizer_of("onnx", source, inputs, **options), path)


def quantize_tensorrt(source: Path, path: Path, inputs: UInt8Array, **options: Any) -> str:
    """Write TensorRT's INT8 file at any path; return why its floating-point part is FP32, empty if it is FP16."""
    quantizer = quantizer_of("tensorrt-onnx", source, inputs, **options)
    _write(quantizer, path)
    assert quantizer.remark.startswith("operators that are not quantised are FP")
    return quantizer.remark.partition("FP32: ")[2]


def _write(quantizer: Quantizer, path: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        shutil.move(quantizer.write(Path(scratch)), path)


def logits_of(model: Path, inputs: UInt8Array) -> np.ndarray:
    """Logits of a model file, one image at a time."""
    opened = runtime.load(model)
    logits = np.concatenate([opened.infer(row[None]) for row in inputs])
    opened.close()
    return logits


def assert_reduced_but_depthwise(weights: Iterable[np.ndarray]) -> None:
    """Check that integers of convolutions' weights take 7 bits, those of depthwise ones 8."""
    greatest = {True: 0, False: 0}
    for values in weights:
        depthwise = values.shape[-3] == 1
        greatest[depthwise] = max(greatest[depthwise], int(np.abs(values.astype(np.int32)).max()))
    assert greatest[True] == 127
    assert 60 <= greatest[False] <= 64
