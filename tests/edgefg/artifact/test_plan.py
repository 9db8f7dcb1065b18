"""What a plan says of itself, and which device it belongs to."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgefg.artifact.hashes import FileInfo
from edgefg.artifact.manifest import HardwareCompatible, PlanInfo
from edgefg.artifact.plan import GpuInfo, check_fits, check_header, mismatch
from edgefg.errors import DeviceMismatchError, RuntimeUnavailableError

ORIN = GpuInfo("Orin", "8.7", 8 << 30)
PATH = Path("models/engine.plan")
SOURCE = FileInfo(name="model.onnx", size=3, sha256="0" * 64)


def header(version: tuple[int, int, int, int] = (10, 16, 1, 11), serialisation: int = 0) -> bytes:
    return struct.pack("<II16x", 0x74727466, serialisation) + bytes(version)


def info(
    gpu: str = "Orin", capability: str = "8.7", tensorrt: str = "10.16.1.11", compatible: HardwareCompatible = "none"
) -> PlanInfo:
    return PlanInfo(
        gpu=gpu, compute_capability=capability, tensorrt=tensorrt, hardware_compatible=compatible, source=SOURCE
    )


def test_the_header_names_the_version() -> None:
    assert check_header(header() + b"engine", PATH) == "10.16.1.11"
    assert check_header(header((11, 4, 0, 106)), PATH) == "11.4.0.106"


def test_another_serialisation_is_unknown_not_bad() -> None:
    assert check_header(header(serialisation=1), PATH) is None


@pytest.mark.parametrize("size", [0, 1, 4, 8, 27])
def test_too_few_bytes(size: int) -> None:
    with pytest.raises(RuntimeUnavailableError, match=rf"engine\.plan has {size} bytes, too few"):
        check_header(header()[:size], PATH)


@given(st.binary(min_size=28, max_size=64))
def test_other_bytes_are_no_plan(data: bytes) -> None:
    if data[:4] == b"ftrt":
        return
    with pytest.raises(RuntimeUnavailableError, match=r"begins with [0-9a-f]{8}, but a TensorRT plan with 66747274"):
        check_header(data, PATH)


@pytest.mark.parametrize(
    ("built", "here", "fits"),
    [
        ("10.16.1.11", "10.16.1.11", True),
        ("10.3.0.30", "10.3.0", True),  # Jetson's package leaves the build number out
        ("10.3.0", "10.3.0.30", True),
        ("10.3.0.30", "10.3.0.26", False),
        ("10.3.0.30", "10.30.0.3", False),
        ("10.16.1.11", "11.4.0.106", False),
    ],
)
def test_versions(built: str, here: str, fits: bool) -> None:
    assert (mismatch(info(tensorrt=built), None, ORIN, here) is None) is fits
    assert (mismatch(None, built, ORIN, here) is None) is fits


@pytest.mark.parametrize(
    ("gpu", "capability", "compatible", "fits"),
    [
        ("Orin", "8.7", "none", True),
        ("Orin Nano", "8.7", "none", False),
        ("Orin Nano", "8.7", "same-capability", True),
        ("Xavier", "7.2", "same-capability", False),
        ("NVIDIA GeForce RTX 3090", "8.6", "ampere-plus", True),
        ("NVIDIA GeForce RTX 3090", "8.6", "same-capability", False),
    ],
)
def test_devices(gpu: str, capability: str, compatible: HardwareCompatible, fits: bool) -> None:
    reason = mismatch(info(gpu, capability, compatible=compatible), None, ORIN, "10.16.1.11")
    assert (reason is None) is fits


def test_ampere_plus_does_not_reach_below_ampere() -> None:
    turing = GpuInfo("NVIDIA T4", "7.5", 16 << 30)
    assert mismatch(info("NVIDIA A2", "8.6", compatible="ampere-plus"), None, turing, "10.16.1.11") is not None


def test_the_message_names_both_sides_and_the_command() -> None:
    with pytest.raises(DeviceMismatchError) as caught:
        check_fits(PATH, info("Xavier", "7.2"), "10.16.1.11", ORIN, "10.16.1.11")
    text = str(caught.value)
    assert "built on Xavier (compute capability 7.2), here is Orin (8.7)" in text
    assert text.endswith("build it here: edgefg build models/model.onnx --to tensorrt")


def test_of_a_bare_plan_only_the_header_speaks() -> None:
    check_fits(PATH, None, None, ORIN, "11.4.0")
    with pytest.raises(DeviceMismatchError, match=r"built by TensorRT 10\.3\.0\.30, here is 11\.4\.0"):
        check_fits(PATH, None, "10.3.0.30", ORIN, "11.4.0")
