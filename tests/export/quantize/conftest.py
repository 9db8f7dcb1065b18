"""A small network that one layer spoils in INT8, and birds that it was labelled with."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edgefg.data.split import Sample
from edgefg.export.quantize.layer_sensitivity import file_logits
from edgefg.preprocess import InputSpec, UInt8Array, prepare
from tests.conftest import TINY

SPEC = InputSpec(height=64, width=64)
HURT = "node_Conv_67"
"""The layer that INT8 hurts."""


@pytest.fixture(scope="package")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny network with one channel 3,000 times as large between two layers: the same function, but not in INT8."""
    model = onnx.load(TINY / "onnx" / "model.onnx")
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor).copy()
        if tensor.name in ("features.3.weight", "features.3.weight_bias"):
            values[0] *= 3000
        elif tensor.name == "features.6.weight":
            values[:, 0] /= 3000
        else:
            continue
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    path = tmp_path_factory.mktemp("spoilt") / "model.onnx"
    onnx.save(model, path)
    return path


@pytest.fixture(scope="package")
def inputs(birds: tuple[tuple[str, ...], list[UInt8Array]]) -> UInt8Array:
    return np.stack([prepare(frame, SPEC) for frame in birds[1]])


@pytest.fixture(scope="package")
def samples(
    birds: tuple[tuple[str, ...], list[UInt8Array]], spoilt: Path, inputs: UInt8Array,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Sample, ...]:  # fmt: skip
    """The birds as files, labelled as the network sees them in FP32."""
    folder = tmp_path_factory.mktemp("birds")
    labels = np.concatenate(list(file_logits(spoilt, [row[None] for row in inputs]))).argmax(1)
    assert len(set(labels)) > 2
    rows = []
    for i, (frame, label) in enumerate(zip(birds[1], labels, strict=True)):
        cv2.imwrite(str(folder / f"{i}.png"), frame)
        rows.append(Sample(folder / f"{i}.png", int(label)))
    return tuple(rows)
