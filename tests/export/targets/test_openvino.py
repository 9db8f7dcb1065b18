"""OpenVINO: conversion, INT8 by NNCF, and the parameters that training reads off an IR."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openvino
import pytest

from edgefg.data.calibration import Calibration
from edgefg.errors import ExportError
from edgefg.export.targets import openvino as target
from edgefg.export.targets import target_of
from edgefg.export.targets.openvino import convert, write_ir
from edgefg.preprocess import UInt8Array
from tests.export.openvino_cpu import compile_for_cpu
from tests.export.quantizing import assert_reduced_but_depthwise, quantizer_of


def _int8_weights(path: Path) -> list[np.ndarray]:
    constants = [op for op in openvino.Core().read_model(path).get_ops() if op.get_type_name() == "Constant"]
    return [op.data for op in constants if op.get_element_type() == openvino.Type.i8]


def test_an_ir_computes_what_the_onnx_file_does(lite0_onnx: Path, unseen: UInt8Array, tmp_path: Path) -> None:
    path = target_of("openvino").emit(lite0_onnx, tmp_path)
    assert path == tmp_path / "model.xml"
    assert path.with_suffix(".bin").is_file()
    ir, onnx = (compile_for_cpu(file) for file in (path, lite0_onnx))
    np.testing.assert_allclose(ir(unseen[:1])[0], onnx(unseen[:1])[0], rtol=1e-5)


@pytest.mark.slow
def test_7_bit_weights_leave_room_for_the_sum(resnet_trt: tuple[Path, Path], tmp_path: Path) -> None:
    inputs = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    for reduce_range, most in ((False, 127), (True, 64)):
        quantizer = quantizer_of("openvino", resnet_trt[0], inputs, batch=2, reduce_range=reduce_range)
        weights = _int8_weights(quantizer.write(tmp_path))
        assert len(weights) > 10
        assert abs(max(int(np.abs(values.astype(np.int32)).max()) for values in weights) - most) <= 1


@pytest.mark.slow
def test_depthwise_weights_keep_8_bits(lite0_onnx: Path, unseen: UInt8Array, tmp_path: Path) -> None:
    path = quantizer_of("openvino", lite0_onnx, unseen[:2], reduce_range=True).write(tmp_path)
    assert_reduced_but_depthwise([values for values in _int8_weights(path) if values.ndim >= 4])


def test_training_reads_every_quantiser_off_the_ir(lite0_onnx: Path, calibration: Calibration, tmp_path: Path) -> None:
    path = quantizer_of("openvino", lite0_onnx, calibration.inputs[:4]).write(tmp_path)
    found = target_of("openvino").activation_params(path)
    operations = openvino.Core().read_model(path).get_ops()
    assert len(found) == sum(op.get_type_name() == "FakeQuantize" for op in operations) >= 49
    assert {params.zero.dtype for params in found.values()} <= {np.dtype("uint8"), np.dtype("int8")}
    assert all((params.scale > 0).all() for params in found.values())
    # 16 pixels, normalised, have one range; inputs of depthwise convolutions have one for each channel.
    assert {params.scale.ndim for params in found.values()} == {0, 1}


def test_what_training_cannot_imitate_is_refused(tmp_path: Path) -> None:
    ops = openvino.opset13
    images = ops.parameter([1, 4], np.float32, name="images")
    limits = [ops.constant(np.float32(value)) for value in (0, 1, 0, 1)]
    model = openvino.Model([ops.fake_quantize(images, *limits, levels=16)], [images])
    openvino.save_model(model, tmp_path / "model.xml", compress_to_fp16=False)
    with pytest.raises(ExportError, match=r"16 levels and .* names instead of 256 and one"):
        target_of("openvino").activation_params(tmp_path / "model.xml")


def test_failures_of_nncf_are_one_line(lite0_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "convert", lambda _: object())
    with pytest.raises(ExportError, match="NNCF could not quantise") as caught:
        quantizer_of("openvino", lite0_onnx, np.zeros((1, 8, 8, 3), np.uint8)).write(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_onnx_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises(ExportError, match="OpenVINO does not convert") as caught:
        convert(tmp_path / "bad.onnx")
    assert "\n" not in str(caught.value)


@pytest.fixture
def small_files() -> Iterator[None]:
    """Let the kernel refuse to write any file beyond 100 kB, as a full disk would, C++ included."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_files")
def test_full_disk(lite0_onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"OpenVINO (could not|did not) write"):
        write_ir(convert(lite0_onnx), tmp_path / "model.xml")
