"""The NVIDIA side of a machine: Jetson and JetPack, GPU and driver, TensorRT, and what does not fit together.

Versions are compared by `packaging` (the extra ``doctor``).
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from edgefg.errors import RuntimeUnavailableError
from edgefg.runtimes.cuda import describe_gpu

JETPACKS: dict[str, tuple[str, str | None, str | None]] = {
    "36.3": ("6.0", "12.2", "8.6"),
    "36.4": ("6.1", "12.6", "10.3"),
    "36.4.3": ("6.2", "12.6", "10.3"),
    "36.4.4": ("6.2.1", "12.6", "10.3"),
    "36.4.7": ("6.2.1", "12.6", "10.3"),
    "36.5": ("6.2.2", "12.6", "10.3"),
    "38.2": ("7.0", "13.0", None),
    "38.2.1": ("7.0", "13.0", None),
    "38.2.2": ("7.0", "13.0", None),
    "38.4": ("7.1", "13.0", "10.13"),
    "39.2": ("7.2", "13.2", "10.16"),
    "39.2.1": ("7.2.1", "13.2", "10.16"),
}
"""Jetson Linux (L4T) to its JetPack, CUDA and TensorRT, as NVIDIA or several users confirm (docs/device/jetson.md)."""
LOWEST_TENSORRT = "10.3"
_HIGHEST_TENSORRT = 11
_SUPPORTED_TENSORRT = f">={LOWEST_TENSORRT},<{_HIGHEST_TENSORRT + 1}"
# TensorRT 10 came to Jetson with this Jetson Linux, that of JetPack 6.1.
_L4T_OF_TENSORRT_10 = "36.4"
# TensorRT 11 came to Jetson with 11.4.1, for this JetPack and later ones.
_JETPACK_OF_TENSORRT_11 = "7.2.2"
_INSTALL_DRIVER = "install NVIDIA's driver (Ubuntu: sudo ubuntu-drivers install), restart, then: nvidia-smi"
_INSTALL_JETPACK = "sudo apt-get update && sudo apt-get install nvidia-jetpack"
_TAKE_JETPACKS = f"pip uninstall tensorrt tensorrt-cu13 tensorrt-cu12, and take JetPack's own: {_INSTALL_JETPACK}"
_FLASH_JETPACK = (
    "flash JetPack 6.1 or later (Orin), or run the ONNX artifact instead: pip install 'edgefg[onnxruntime]'"
)


class Jetson(msgspec.Struct, frozen=True, kw_only=True):
    """An NVIDIA Jetson and the software of its JetPack."""

    board: str
    l4t: str
    """Release of Jetson Linux, for instance ``36.4.3``."""
    jetpack: str | None = None
    """None if this edgefg does not know the Jetson Linux."""
    cuda: str | None = None
    tensorrt: str | None = None


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """The first NVIDIA GPU, as CUDA's bindings see it."""

    name: str | None = None
    compute_capability: str | None = None
    memory: int | None = None
    """Bytes."""
    cuda: str | None = None
    """The newest CUDA that the driver runs."""
    problem: str = ""
    """Why it cannot be used."""


class TensorRTStatus(msgspec.Struct, frozen=True, kw_only=True):
    """TensorRT and its binding to CUDA, which plans need."""

    version: str | None
    supported: bool | None
    """None if it is not installed, or if versions cannot be compared."""
    binding: str | None
    """CUDA's Python binding that will be used: cuda-python or PyCUDA, and its version."""


class Advice(msgspec.Struct, frozen=True):
    """Something that does not fit, or that this machine's GPU lacks, and the command that mends it."""

    finding: str
    command: str


def find_jetson(root: Path) -> Jetson | None:
    """Describe the Jetson whose file system is at ``root``; None if it is not a Jetson."""
    # For instance: # R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: …
    match = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", _text(root / "etc" / "nv_tegra_release"))
    if match is None:
        return None
    l4t = f"{match[1]}.{match[2]}".removesuffix(".0")
    board = _text(root / "proc" / "device-tree" / "model").strip("\0\n ") or "NVIDIA Jetson"
    # All of Jetson Linux 36 is JetPack 6, with CUDA 12.
    jetpack, cuda, tensorrt = JETPACKS.get(l4t, ("6", "12", None) if match[1] == "36" else (None, None, None))
    return Jetson(board=board, l4t=l4t, jetpack=jetpack, cuda=cuda, tensorrt=tensorrt)


def find_driver(root: Path) -> str | None:
    """Return the version of NVIDIA's driver; None if there is none."""
    # For instance: NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (…
    match = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", _text(root / "proc" / "driver" / "nvidia" / "version"))
    return match[1] if match else None


def read_gpu() -> Gpu:
    """Describe the first NVIDIA GPU of this machine, or why it cannot be used."""
    cuda = _driver_cuda()
    try:
        device, _ = describe_gpu()
    except RuntimeUnavailableError as exc:
        return Gpu(cuda=cuda, problem=str(exc).partition("; run `edgefg doctor`")[0])
    return Gpu(name=device.name, compute_capability=device.compute_capability, memory=device.memory, cuda=cuda)


def _driver_cuda() -> str | None:
    """Return the newest CUDA that the driver runs; None without driver or cuda-python."""
    try:
        from cuda.bindings import runtime

        _, version = runtime.cudaDriverGetVersion()
    except (ImportError, RuntimeError):  # RuntimeError: libcuda is not there
        return None
    return f"{int(version) // 1000}.{int(version) % 1000 // 10}" if int(version) else None


def fits(version: str | None, specifier: str) -> bool:
    """Tell whether a version is within a PEP 440 specifier; False if it is not known or not a version."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion

    try:
        return version is not None and SpecifierSet(specifier).contains(version, prereleases=True)
    except InvalidVersion:
        return False


def is_supported(tensorrt: str | None) -> bool | None:
    """Tell whether edgefg runs plans with this TensorRT; None if it is not installed."""
    return None if tensorrt is None else fits(tensorrt, _SUPPORTED_TENSORRT)


def advise(root: Path, jetson: Jetson | None, driver: str | None, gpu: Gpu, tensorrt: TensorRTStatus) -> list[Advice]:
    """List what plans lack here; nothing on a machine without NVIDIA GPU and without TensorRT."""
    if jetson is None and driver is None and gpu.name is None:
        if tensorrt.version is None:
            return []
        return [Advice("TensorRT is installed, but no driver of an NVIDIA GPU", _INSTALL_DRIVER)]
    found = _about_tensorrt(root, jetson, gpu, tensorrt)
    cuda = gpu.cuda or (jetson and jetson.cuda)
    most = int(cuda.split(".")[0]) if cuda else None
    matching = f"pip install '{_cuda_python(most)}'"
    if tensorrt.binding is None:
        found.append(Advice("cuda-python is missing; plans need it", matching))
    elif tensorrt.binding.startswith("pycuda"):
        found.append(Advice("PyCUDA works, without CUDA graphs; cuda-python is faster", matching))
    elif most is not None and fits(tensorrt.binding.split()[1], f">={most + 1}"):
        found.append(Advice(f"{tensorrt.binding} is newer than the driver, which runs CUDA {cuda}", matching))
    elif gpu.problem:
        found.append(Advice(gpu.problem, "sudo dmesg | grep -i nv" if jetson else _INSTALL_DRIVER))
    return found


def _about_tensorrt(root: Path, jetson: Jetson | None, gpu: Gpu, tensorrt: TensorRTStatus) -> list[Advice]:
    version = tensorrt.version
    if jetson is not None:
        return _about_jetson_tensorrt(root, jetson, version)
    wanted = "tensorrt-cu12" if fits(gpu.cuda, "==12.*") else "tensorrt"
    command = f"pip install '{wanted}{_SUPPORTED_TENSORRT}'"
    if version is None:
        return [Advice("TensorRT is missing; plans need it", command)]
    return [] if tensorrt.supported else [Advice(_unsupported(version), command)]


def _about_jetson_tensorrt(root: Path, jetson: Jetson, version: str | None) -> list[Advice]:
    """Say how to get TensorRT on a Jetson, where only its JetPack's own runs."""
    too_new = fits(version, f"=={_HIGHEST_TENSORRT}.*") and fits(jetson.jetpack, f"<{_JETPACK_OF_TENSORRT_11}")
    if is_supported(version) and not too_new:
        return []
    if fits(jetson.l4t, f"<{_L4T_OF_TENSORRT_10}"):
        finding = f"JetPack {jetson.jetpack or 'before 6.1'} has an older TensorRT; {_needed()}"
        return [Advice(finding, _FLASH_JETPACK)]
    if version is None and any((root / "usr" / "lib").glob("python3*/dist-packages/tensorrt")):
        finding = "TensorRT is installed for the system's Python, which this environment does not see"
        return [Advice(finding, "/usr/bin/python3 -m venv --system-site-packages .venv, and install edgefg in it")]
    if version is None:
        return [Advice("TensorRT is missing; plans need it", _INSTALL_JETPACK)]
    if too_new:
        finding = f"TensorRT {version} needs JetPack {_JETPACK_OF_TENSORRT_11}, here is {jetson.jetpack}"
        return [Advice(finding, _TAKE_JETPACKS)]
    return [Advice(_unsupported(version), _INSTALL_JETPACK)]


def _needed() -> str:
    return f"edgefg needs {LOWEST_TENSORRT} or later of 10, or {_HIGHEST_TENSORRT}"


def _unsupported(version: str) -> str:
    return f"TensorRT {version} is not supported; {_needed()}"


def _cuda_python(most: int | None) -> str:
    return "cuda-python>=12.6.2,<13" if most == 12 else "cuda-python>=12.6.2"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
