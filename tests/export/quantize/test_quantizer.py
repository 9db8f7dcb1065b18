"""Which INT8 weights take 7 bits."""

from __future__ import annotations

import pytest
import torch

from edgefg.export.quantize.quantizer import needs_seven_bits

ZEN3 = {"architecture": "x86_64", "avx2": True, "avx512_vnni": False, "avx_vnni": False, "amx_int8": False}


@pytest.mark.parametrize(
    ("capabilities", "saturates"),
    [
        (ZEN3, True),
        ({**ZEN3, "avx512_vnni": True}, False),
        ({**ZEN3, "avx_vnni": True}, False),
        ({"architecture": "aarch64", "dot": True}, False),
        ({}, False),
    ],
)
def test_weights_take_7_bits_where_this_cpu_would_saturate(
    capabilities: dict[str, object], saturates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert needs_seven_bits("openvino", None) == saturates
    assert needs_seven_bits("onnx", None) == saturates
    assert not needs_seven_bits("tensorrt-onnx", None)


def test_what_is_asked_is_done_and_an_older_torch_asks_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: ZEN3, raising=False)
    assert not needs_seven_bits("openvino", False)
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert needs_seven_bits("onnx", True)
    assert not needs_seven_bits("onnx", None)
