"""What every target has, and the rules that it refuses settings by."""

from __future__ import annotations

import typing
from pathlib import Path

import onnx
import pytest
import torch

from edgefg.errors import ExportError
from edgefg.export.targets import TARGETS, target_of
from edgefg.settings.quantization import QuantizationConfig, TargetName

ZEN3 = {"architecture": "x86_64", "avx2": True, "avx512_vnni": False, "avx_vnni": False, "amx_int8": False}
DEFAULT = QuantizationConfig()


def test_each_name_has_one_target() -> None:
    assert tuple(TARGETS) == typing.get_args(TargetName)
    for name, target in TARGETS.items():
        assert target_of(name) is target
        assert target.name == name
        assert target.model_name == f"model{target.suffix}"
    with pytest.raises(ExportError, match=r"'coreml' is not a target\. Use one of openvino, onnx, tensorrt-onnx"):
        target_of("coreml")


@pytest.mark.parametrize(
    ("capabilities", "reduced"),
    [
        (ZEN3, True),
        ({**ZEN3, "avx512_vnni": True}, False),
        ({**ZEN3, "avx_vnni": True}, False),
        ({"architecture": "aarch64", "dot": True}, False),
        ({}, False),
    ],
)
def test_weights_take_7_bits_on_a_cpu_that_would_saturate(
    capabilities: dict[str, object], reduced: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "edgefg")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    bits = 7 if reduced else 8
    assert [target.weight_bits(DEFAULT) for target in TARGETS.values()] == [bits, bits, 8]
    assert target_of("onnx").decide_range(DEFAULT).reduce_range == reduced
    assert ("this CPU lacks VNNI" in caplog.text) == reduced


def test_what_is_asked_for_is_done(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "edgefg")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: ZEN3, raising=False)
    assert target_of("openvino").weight_bits(QuantizationConfig(reduce_range=False)) == 8
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # a torch that is too old to tell
    assert target_of("onnx").weight_bits(DEFAULT) == 8
    assert target_of("onnx").decide_range(QuantizationConfig(reduce_range=True)).reduce_range
    assert not caplog.records


def test_settings_that_a_target_does_not_support() -> None:
    with pytest.raises(ExportError, match=r"--precision fp16 is not available for ONNX Runtime .*Use fp32 or int8"):
        target_of("onnx").check("fp16", DEFAULT)
    with pytest.raises(ExportError, match="--reduce-range is for CPUs only"):
        target_of("tensorrt-onnx").check("int8", QuantizationConfig(reduce_range=True))
    with pytest.raises(ExportError, match=r"--calibrator entropy is not available for OpenVINO .*percentile, mse"):
        target_of("openvino").check("int8", QuantizationConfig(calibrator="entropy"))
    for target in TARGETS.values():
        for precision in target.precisions:
            for calibrator in target.calibrators:
                target.check(precision, QuantizationConfig(calibrator=calibrator))


def test_a_target_that_reads_onnx_takes_the_file_as_it_is(lite0_onnx: Path, tmp_path: Path) -> None:
    path = target_of("onnx").emit(lite0_onnx, tmp_path)
    assert path == tmp_path / "model.onnx"
    assert path.read_bytes() == lite0_onnx.read_bytes()


def test_a_trained_graph_is_stored_with_integer_weights(trt: Path, tmp_path: Path) -> None:
    path = target_of("onnx").emit_qdq(onnx.load(trt), tmp_path, None)  # type: ignore[arg-type]  # nothing is compared
    assert path.stat().st_size < 0.75 * trt.stat().st_size
