"""doctor, on machines that are simulated: a folder for the root, tables for what is installed."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from edgefg.doctor import Machine, Report, diagnose, render
from edgefg.nvidia import Gpu, TensorRTStatus

REQUIRES = (
    *("numpy>=1.26", "cyclopts>=4.25", 'onnxruntime>=1.20; extra == "onnxruntime"'),
    *('tensorrt>=10.3; extra == "tensorrt"', 'cuda-python>=12.6.2; extra == "tensorrt"'),
    *('pycuda>=2024.1; extra == "pycuda"', 'edgefg[report]; extra == "train"', 'torch>=2.9; extra == "train"'),
    *('edgefg[demo]; extra == "dev"', 'hypothesis>=6.100; extra == "dev"', 'setuptools>=77; extra == "dev"'),
)
CORE = {"numpy": "2.4.6", "cyclopts": "5.5.2", "onnxruntime": "1.32.0", "torch": "2.14.1"}
NO_GPU = Gpu(problem="neither cuda-python nor PyCUDA is installed")
ORIN = Gpu(name="Orin", compute_capability="8.7", memory=32 * 2**30, cuda="12.6")
THOR = Gpu(name="Thor", compute_capability="11.0", memory=120 * 2**30, cuda="13.0")


Examine = Callable[..., Report]


@pytest.fixture
def machine(tmp_path: Path) -> Examine:
    """Describe a machine and examine it."""

    def examine(
        installed: dict[str, str], *, l4t: str = "", driver: str = "", gpu: Gpu = NO_GPU, system: str = ""
    ) -> Report:
        files = {}
        if l4t:
            release, _, revision = l4t.partition(".")
            files["etc/nv_tegra_release"] = (
                f"# R{release} (release), REVISION: {revision}, GCID: 42132812, BOARD: generic, EABI: aarch64,"
                " DATE: Thu Sep 18 22:54:44 UTC 2025\n# KERNEL_VARIANT: oot\n"
            )
            files["proc/device-tree/model"] = "NVIDIA Jetson AGX Orin Developer Kit\0"
        if driver:
            files["proc/driver/nvidia/version"] = driver
        if system:
            files[f"usr/lib/{system}/dist-packages/tensorrt/__init__.py"] = ""
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content)
        here = Machine(tmp_path, "aarch64" if l4t else "x86_64", (CORE | installed).get, lambda: REQUIRES, lambda: gpu)
        return diagnose(here)

    return examine


X86 = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (dvs-builder)\nGCC version\n"


def todo(report: Report) -> list[tuple[str, str]]:
    return [(advice.finding, advice.command) for advice in report.advice]


def test_a_machine_without_gpu_lacks_nothing(machine: Examine) -> None:
    report = machine({})
    assert report.jetson is None
    assert report.driver is None
    assert not report.advice
    assert report.tensorrt == TensorRTStatus(version=None, supported=None, binding=None)
    assert "no NVIDIA GPU can be used: neither" in render(report)
    assert "to do" not in render(report)


def test_packages_by_extra(machine: Examine) -> None:
    report = machine({})
    assert report.packages == {
        "core": {"numpy": "2.4.6", "cyclopts": "5.5.2"},
        "onnxruntime": {"onnxruntime": "1.32.0"},
        "tensorrt": {"tensorrt": None, "cuda-python": None},
        "pycuda": {"pycuda": None},
        "train": {"torch": "2.14.1"},
    }
    text = render(report)
    assert re.search(r"^ok +onnxruntime +opens \.onnx; onnxruntime 1\.32\.0$", text, re.MULTILINE)
    assert re.search(r"^-- +tensorrt +opens \.engine, \.plan; missing tensorrt, cuda-python$", text, re.MULTILINE)


def test_an_incomplete_extra_names_its_command_and_an_old_package_too(machine: Examine) -> None:
    report = machine({"torch": "2.1.0+cpu", "numpy": None, "onnxruntime": None, "setuptools": "59.6.0"})
    assert report.install == {"core": "pip install edgefg", "onnxruntime": "pip install 'edgefg[onnxruntime]'"}
    assert todo(report) == [("torch 2.1.0+cpu does not fit; edgefg needs >=2.9", "pip install --upgrade 'torch>=2.9'")]
    assert "missing onnxruntime: pip install 'edgefg[onnxruntime]'\n" in render(report)
    assert "to do: torch 2.1.0+cpu does not fit" in render(report)


@pytest.mark.parametrize(
    ("l4t", "jetpack"),
    [("36.3.0", "6.0"), ("36.4.0", "6.1"), ("36.4.3", "6.2"), ("36.4.7", "6.2.1"), ("36.5.0", "6.2.2"),
     ("36.9.0", "6"), ("38.2.0", "7.0"), ("38.4.0", "7.1"), ("39.2.0", "7.2"), ("39.2.1", "7.2.1"), ("39.9.0", None),
     ("35.4.1", None)],
)  # fmt: skip
def test_jetson_linux_names_its_jetpack(machine: Examine, l4t: str, jetpack: str | None) -> None:
    report = machine({}, l4t=l4t)
    assert report.jetson is not None
    assert report.jetson.l4t == l4t.removesuffix(".0")
    assert report.jetson.jetpack == jetpack
    known = f"JetPack {jetpack}" if jetpack else "a JetPack that this edgefg does not know"
    line = f"NVIDIA Jetson AGX Orin Developer Kit: Jetson Linux {l4t.removesuffix('.0')}, {known}"
    assert line in render(report)


def test_jetpack_6_complete(machine: Examine) -> None:
    report = machine({"tensorrt": "10.3.0", "cuda-bindings": "12.9.10"}, l4t="36.4.3", gpu=ORIN)
    assert report.tensorrt == TensorRTStatus(version="10.3.0", supported=True, binding="cuda-python 12.9.10")
    assert not report.advice
    text = render(report)
    assert "JetPack 6.2 with CUDA 12.6, TensorRT 10.3" in text
    assert "Orin, compute capability 8.7, 32.0 GiB, up to CUDA 12.6" in text


def test_jetpack_6_takes_the_cuda_python_of_its_cuda(machine: Examine) -> None:
    for l4t in ("36.4.3", "36.9.0"):  # the second is not known
        report = machine({}, l4t=l4t)
        assert ("cuda-python is missing; plans need it", "pip install 'cuda-python>=12.6.2,<13'") in todo(report)
    report = machine({"cuda-bindings": "13.5.0"}, l4t="36.4.3", gpu=Gpu(problem="error 35"))
    assert (
        "cuda-python 13.5.0 is newer than the driver, which runs CUDA 12.6",
        "pip install 'cuda-python>=12.6.2,<13'",
    ) in (todo(report))


@pytest.mark.parametrize(
    ("l4t", "jetpack", "installed"),
    [
        *(("36.3.0", "6.0", {}), ("36.3.0", "6.0", {"tensorrt": "8.6.2"}), ("36.3.0", "6.0", {"tensorrt": "11.4.1"})),
        *(("35.4.1", "before 6.1", {}), ("35.4.1", "before 6.1", {"tensorrt": "8.5.2.2"})),
    ],
)
def test_jetpack_before_6_1(machine: Examine, l4t: str, jetpack: str, installed: dict[str, str]) -> None:
    report = machine({"cuda-python": "12.6.2"} | installed, l4t=l4t, gpu=ORIN, system="python3.10")
    ((finding, command),) = todo(report)
    assert finding == f"JetPack {jetpack} has an older TensorRT; edgefg needs 10.3 or later of 10, or 11"
    assert command.startswith("flash JetPack 6.1 or later")
    assert "edgefg[onnxruntime]" in command


def test_a_container_s_own_tensorrt_runs_on_jetpack_6_0(machine: Examine) -> None:
    assert not machine({"tensorrt": "10.3.0", "cuda-bindings": "12.6.2"}, l4t="36.3.0", gpu=ORIN).advice


def test_jetpack_7_complete(machine: Examine) -> None:
    report = machine({"tensorrt": "10.13.3.9", "cuda-bindings": "13.0.3"}, l4t="38.4.0", gpu=THOR)
    assert report.tensorrt.supported
    assert not report.advice


@pytest.mark.parametrize(
    ("l4t", "jetpack", "cuda"), [("36.4.3", "6.2", "12.9.10"), ("36.9.0", "6", "12.9.10"), ("38.4.0", "7.1", "13.0.3")]
)
@pytest.mark.parametrize(
    ("installed", "system", "finding", "command"),
    [
        ({}, "", "TensorRT is missing; plans need it", "sudo apt-get update && sudo apt-get install nvidia-jetpack"),
        ({}, "python3.10", "for the system's Python", "/usr/bin/python3 -m venv --system-site-packages"),
        ({"tensorrt": "11.4.1"}, "", "TensorRT 11.4.1 needs JetPack 7.2.2, here is JETPACK", "pip uninstall tensorrt "),
        ({"tensorrt": "10.1.0"}, "", "TensorRT 10.1.0 is not supported; edgefg needs 10.3", "nvidia-jetpack"),
    ],
)
def test_a_jetpack_takes_its_own_tensorrt(
    machine: Examine,
    l4t: str,
    jetpack: str,
    cuda: str,
    installed: dict[str, str],
    system: str,
    finding: str,
    command: str,
) -> None:
    gpu = THOR if l4t == "38.4.0" else ORIN
    report = machine({"cuda-bindings": cuda} | installed, l4t=l4t, gpu=gpu, system=system)
    ((found, advised),) = todo(report)
    assert finding.replace("JETPACK", jetpack) in found
    assert command in advised


def test_tensorrt_11_on_a_jetpack_that_is_not_known_is_not_refused(machine: Examine) -> None:
    report = machine({"tensorrt": "11.4.1", "cuda-bindings": "13.2.0"}, l4t="39.9.0", gpu=THOR)
    assert not report.advice


RTX = Gpu(name="NVIDIA RTX A2000", compute_capability="8.6", memory=12 * 2**30, cuda="13.0")


def test_a_desktop_that_is_complete(machine: Examine) -> None:
    for version in ("10.3.0", "10.16.1.11", "11.4.0.106"):
        report = machine({"tensorrt": version, "cuda-python": "13.4.4"}, driver=X86, gpu=RTX)
        assert report.tensorrt.supported
        assert not report.advice
    assert report.driver == "580.95.05"
    assert "NVIDIA RTX A2000, compute capability 8.6, 12.0 GiB, driver 580.95.05, up to CUDA 13.0" in render(report)


def test_a_desktop_without_anything(machine: Examine) -> None:
    assert todo(machine({}, driver=X86)) == [
        ("TensorRT is missing; plans need it", "pip install 'tensorrt>=10.3,<12'"),
        ("cuda-python is missing; plans need it", "pip install 'cuda-python>=12.6.2'"),
    ]


def test_a_desktop_whose_driver_is_of_cuda_12(machine: Examine) -> None:
    old = msgspec.structs.replace(RTX, cuda="12.8")
    assert todo(machine({"tensorrt": "10.1.0", "cuda-bindings": "13.0.0"}, driver=X86, gpu=old)) == [
        (
            "TensorRT 10.1.0 is not supported; edgefg needs 10.3 or later of 10, or 11",
            "pip install 'tensorrt-cu12>=10.3,<12'",
        ),
        (
            "cuda-python 13.0.0 is newer than the driver, which runs CUDA 12.8",
            "pip install 'cuda-python>=12.6.2,<13'",
        ),
    ]
    report = machine({"tensorrt-cu12": "10.16.1.11", "cuda-bindings": "12.9.0"}, driver=X86, gpu=old)
    assert (report.tensorrt.version, report.advice) == ("10.16.1.11", ())


def test_tensorrt_of_a_later_major_version(machine: Examine) -> None:
    report = machine({"tensorrt": "12.0.1", "cuda-python": "13.4.4"}, driver=X86, gpu=RTX)
    assert report.tensorrt.supported is False
    assert todo(report)[0][0].startswith("TensorRT 12.0.1 is not supported")


def test_pycuda_alone_works_but_slower(machine: Examine) -> None:
    report = machine({"tensorrt": "10.16.1", "pycuda": "2026.1"}, driver=X86, gpu=RTX)
    assert report.tensorrt.binding == "pycuda 2026.1"
    assert todo(report) == [
        ("PyCUDA works, without CUDA graphs; cuda-python is faster", "pip install 'cuda-python>=12.6.2'")
    ]


@pytest.mark.parametrize(("driver", "finding"), [("", "but no driver"), (X86, "error 999")])
def test_a_gpu_that_cannot_be_used(machine: Examine, driver: str, finding: str) -> None:
    installed = {"tensorrt": "10.16.1", "cuda-python": "13.4.4"}
    ((found, command),) = todo(machine(installed, driver=driver, gpu=Gpu(problem="error 999")))
    assert finding in found
    assert "nvidia-smi" in command


def test_json_is_the_report(machine: Examine) -> None:
    report = machine({}, l4t="36.4.3")
    assert msgspec.json.decode(msgspec.json.encode(report), type=Report) == report


def test_without_packaging_versions_are_not_compared(machine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "packaging", None)
    report = machine({"tensorrt": "8.6.2", "cuda-python": "12.6.2"}, l4t="36.4.3", gpu=ORIN)
    assert report.packages["onnxruntime"] == {"onnxruntime": "1.32.0"}
    assert report.packages["train"] == {"torch": "2.14.1"}
    assert (report.tensorrt.version, report.tensorrt.supported) == ("8.6.2", None)
    assert todo(report) == [
        ("packaging is not installed, so versions are not compared", "pip install 'edgefg[doctor]'"),
    ]
    assert "JetPack 6.2 with CUDA 12.6, TensorRT 10.3" in render(report)
