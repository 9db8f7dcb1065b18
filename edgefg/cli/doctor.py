"""Checks of a machine: packages, GPU, TensorRT and JetPack, and what to do about what is missing."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from edgefg import __version__
from edgefg.cli.device import cpus
from edgefg.errors import RuntimeUnavailableError
from edgefg.runtimes.cuda import describe_gpu

_OPENS = {"openvino": ".xml", "onnxruntime": ".onnx", "tensorrt": ".plan"}
_FOR_DEVELOPERS = ("demo", "dev")
_FOR_NVIDIA = ("tensorrt", "pycuda")
# Other packages that bring the same.
_ALSO = {"tensorrt": ("tensorrt-cu13", "tensorrt-cu12"), "cuda-python": ("cuda-bindings",)}
# What each Jetson Linux (L4T) belongs to and brings: JetPack, CUDA, TensorRT. Only what NVIDIA's pages or the devices
# of several users confirm (docs/device/jetson.md).
_JETPACKS: dict[str, tuple[str, str | None, str | None]] = {
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
_LOWEST_TENSORRT = "10.3"
_HIGHEST_TENSORRT = 11
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
    """An NVIDIA Jetson, and what its JetPack brings."""

    board: str
    l4t: str
    """Release of Jetson Linux, for instance ``36.4.3``."""
    jetpack: str | None = None
    """None where this Jetson Linux is not known here."""
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


class TensorRT(msgspec.Struct, frozen=True, kw_only=True):
    """What plans need."""

    version: str | None
    supported: bool | None
    """None where there is none."""
    binding: str | None
    """CUDA's Python binding that will be used: cuda-python or PyCUDA, and its version."""


class Advice(msgspec.Struct, frozen=True):
    """What does not fit, or is missing for this machine's GPU, and what to do about it."""

    finding: str
    command: str


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What `doctor` found."""

    edgefg: str
    python: str
    machine: str
    cpus: int
    packages: dict[str, dict[str, str | None]]
    """By extra: each package and its version, None where it is not installed."""
    install: dict[str, str]
    """By extra that is not complete: the command that installs it; `advice` has what a GPU needs."""
    driver: str | None
    """Version of NVIDIA's driver."""
    jetson: Jetson | None
    gpu: Gpu
    tensorrt: TensorRT
    advice: tuple[Advice, ...]


class Here(NamedTuple):
    """How to look at a machine."""

    root: Path
    machine: str
    version: Callable[[str], str | None]
    """Version of an installed package."""
    requires: Callable[[], Sequence[str]]
    """The requirements of edgefg itself, as its metadata has them."""
    gpu: Callable[[], Gpu]


def examine() -> Report:
    """Examine this machine."""
    return look(Here(Path("/"), platform.machine(), _version, _requires, _read_gpu))


def look(here: Here) -> Report:
    """Examine a machine."""
    packages = _packages(here)
    jetson, gpu, driver = _jetson(here.root), here.gpu(), _driver(here.root)
    version = _find(here, "tensorrt")
    bindings = ((name, _find(here, name)) for name in ("cuda-python", "pycuda"))  # as the runtime takes them
    binding = next((f"{name} {found}" for name, found in bindings if found), None)
    tensorrt = TensorRT(version=version, supported=_is_supported(version), binding=binding)
    return Report(
        edgefg=__version__,
        python=platform.python_version(),
        machine=here.machine,
        cpus=cpus(),
        packages=packages,
        install=_install(packages),
        driver=driver,
        jetson=jetson,
        gpu=gpu,
        tensorrt=tensorrt,
        advice=(*_about_nvidia(here, jetson, driver, gpu, tensorrt), *_too_old(here, packages)),
    )


def render(report: Report) -> str:
    """Return the report as text for people."""
    lines = [f"edgefg {report.edgefg}, Python {report.python}, {report.machine}, {report.cpus} CPUs"]
    if report.jetson is not None:
        lines.append(_render_jetson(report.jetson))
    lines.append(_render_gpu(report.gpu, report.driver))
    for extra, packages in report.packages.items():
        missing = [package for package, version in packages.items() if version is None]
        parts = [f"opens {_OPENS[extra]}"] if extra in _OPENS else []
        parts += [", ".join(f"{package} {version}" for package, version in packages.items() if version)]
        parts += [f"missing {', '.join(missing)}"] if missing else []
        line = f"{'--' if missing else 'ok'}  {extra:12} {'; '.join(filter(None, parts))}"
        lines.append(f"{line}: {report.install[extra]}" if extra in report.install else line)
    lines += [f"to do: {advice.finding}\n       {advice.command}" for advice in report.advice]
    return "\n".join(lines)


def _render_gpu(gpu: Gpu, driver: str | None) -> str:
    if gpu.name is None:
        parts = [f"no NVIDIA GPU can be used: {gpu.problem}", f"driver {driver}" if driver else ""]
        return "; ".join(filter(None, parts))
    memory = f"{(gpu.memory or 0) / 2**30:.1f} GiB"
    parts = [gpu.name, f"compute capability {gpu.compute_capability}", memory]
    parts += [f"driver {driver}" if driver else "", f"up to CUDA {gpu.cuda}" if gpu.cuda else ""]
    return ", ".join(filter(None, parts))


def _render_jetson(jetson: Jetson) -> str:
    brings = [
        f"{name} {version}" for name, version in (("CUDA", jetson.cuda), ("TensorRT", jetson.tensorrt)) if version
    ]
    known = f"JetPack {jetson.jetpack}" if jetson.jetpack else "a JetPack that this edgefg does not know"
    return f"{jetson.board}: Jetson Linux {jetson.l4t}, {known}" + (f" with {', '.join(brings)}" if brings else "")


def _packages(here: Here) -> dict[str, dict[str, str | None]]:
    """List edgefg's requirements by extra, with what is installed of them."""
    found: dict[str, dict[str, str | None]] = {"core": {}}
    for requirement in here.requires():
        match = re.match(r"([\w.-]+)[^;\[]*(?:;.*extra == ['\"]([\w-]+)['\"])?", requirement)
        if match and match[1] != "edgefg" and match[2] not in _FOR_DEVELOPERS:
            found.setdefault(match[2] or "core", {})[match[1]] = _find(here, match[1])
    return found


def _find(here: Here, package: str) -> str | None:
    """Return a package's version, by any of its names."""
    return next(filter(None, map(here.version, (package, *_ALSO.get(package, ())))), None)


def _install(packages: dict[str, dict[str, str | None]]) -> dict[str, str]:
    incomplete = [extra for extra, found in packages.items() if None in found.values() and extra not in _FOR_NVIDIA]
    return {
        extra: f"pip install 'edgefg[{extra}]'" if extra != "core" else "pip install edgefg" for extra in incomplete
    }


def _jetson(root: Path) -> Jetson | None:
    # For instance: # R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: …
    match = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", _text(root / "etc" / "nv_tegra_release"))
    if match is None:
        return None
    l4t = f"{match[1]}.{match[2]}".removesuffix(".0")
    board = _text(root / "proc" / "device-tree" / "model").strip("\0\n ") or "NVIDIA Jetson"
    # All of Jetson Linux 36 is JetPack 6, with CUDA 12.
    jetpack, cuda, tensorrt = _JETPACKS.get(l4t, ("6", "12", None) if match[1] == "36" else (None, None, None))
    return Jetson(board=board, l4t=l4t, jetpack=jetpack, cuda=cuda, tensorrt=tensorrt)


def _driver(root: Path) -> str | None:
    # For instance: NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (…
    match = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", _text(root / "proc" / "driver" / "nvidia" / "version"))
    return match[1] if match else None


def _is_supported(tensorrt: str | None) -> bool | None:
    if tensorrt is None:
        return None
    return _numbers(tensorrt) >= _numbers(_LOWEST_TENSORRT) and _numbers(tensorrt)[0] <= _HIGHEST_TENSORRT


def _too_old(here: Here, packages: dict[str, dict[str, str | None]]) -> list[Advice]:
    """Compare what is installed with the lower bounds of edgefg's requirements; TensorRT's is told apart."""
    installed = {package: version for extra in packages.values() for package, version in extra.items()}
    found: dict[str, Advice] = {}
    for requirement in here.requires():
        match = re.match(r"([\w.-]+)>=([\d.]+)", requirement)
        version = installed.get(match[1]) if match and match[1] != "tensorrt" else None
        if match and version and _numbers(version) < _numbers(match[2]):
            finding = f"{match[1]} {version} is too old; needed {match[2]} or later"
            found[match[1]] = Advice(finding, f"pip install --upgrade '{match[1]}>={match[2]}'")
    return list(found.values())


def _about_nvidia(here: Here, jetson: Jetson | None, driver: str | None, gpu: Gpu, tensorrt: TensorRT) -> list[Advice]:
    """Say what plans lack here; nothing on a machine that has no NVIDIA GPU and no TensorRT."""
    if jetson is None and driver is None and gpu.name is None:
        if tensorrt.version is None:
            return []
        return [Advice("TensorRT is installed, but no driver of an NVIDIA GPU", _INSTALL_DRIVER)]
    found = _about_tensorrt(here, jetson, gpu, tensorrt)
    cuda = gpu.cuda or (jetson and jetson.cuda)
    most = int(cuda.split(".")[0]) if cuda else None
    matching = f"pip install '{_cuda_python(most)}'"
    if tensorrt.binding is None:
        found.append(Advice("cuda-python is missing; plans need it", matching))
    elif tensorrt.binding.startswith("pycuda"):
        found.append(Advice("PyCUDA works, without CUDA graphs; cuda-python is faster", matching))
    elif most is not None and _numbers(tensorrt.binding.split()[1])[0] > most:
        found.append(Advice(f"{tensorrt.binding} is newer than the driver, which runs CUDA {cuda}", matching))
    elif gpu.problem:
        found.append(Advice(gpu.problem, "sudo dmesg | grep -i nv" if jetson else _INSTALL_DRIVER))
    return found


def _about_tensorrt(here: Here, jetson: Jetson | None, gpu: Gpu, tensorrt: TensorRT) -> list[Advice]:
    version = tensorrt.version
    if jetson is not None:
        return _about_jetson_tensorrt(here, jetson, version)
    wanted = "tensorrt-cu12" if gpu.cuda and _numbers(gpu.cuda)[0] == 12 else "tensorrt"
    command = f"pip install '{wanted}>={_LOWEST_TENSORRT},<{_HIGHEST_TENSORRT + 1}'"
    if version is None:
        return [Advice("TensorRT is missing; plans need it", command)]
    return [] if tensorrt.supported else [Advice(_unsupported(version), command)]


def _about_jetson_tensorrt(here: Here, jetson: Jetson, version: str | None) -> list[Advice]:
    """Say how to get TensorRT on a Jetson, where only its JetPack's own runs."""
    too_early = jetson.jetpack is not None and _numbers(jetson.jetpack) < _numbers(_JETPACK_OF_TENSORRT_11)
    too_new = version is not None and _numbers(version)[0] == _HIGHEST_TENSORRT and too_early
    if _is_supported(version) and not too_new:
        return []
    if _numbers(jetson.l4t) < _numbers(_L4T_OF_TENSORRT_10):
        finding = f"JetPack {jetson.jetpack or 'before 6.1'} has an older TensorRT; {_needed()}"
        return [Advice(finding, _FLASH_JETPACK)]
    if version is None and any((here.root / "usr" / "lib").glob("python3*/dist-packages/tensorrt")):
        finding = "TensorRT is installed for the system's Python, which this environment does not see"
        return [Advice(finding, "/usr/bin/python3 -m venv --system-site-packages .venv, and install edgefg in it")]
    if version is None:
        return [Advice("TensorRT is missing; plans need it", _INSTALL_JETPACK)]
    if too_new:
        finding = f"TensorRT {version} needs JetPack {_JETPACK_OF_TENSORRT_11}, here is {jetson.jetpack}"
        return [Advice(finding, _TAKE_JETPACKS)]
    return [Advice(_unsupported(version), _INSTALL_JETPACK)]


def _needed() -> str:
    return f"needed {_LOWEST_TENSORRT} or later of 10, or {_HIGHEST_TENSORRT}"


def _unsupported(version: str) -> str:
    return f"TensorRT {version} is not supported; {_needed()}"


def _cuda_python(most: int | None) -> str:
    return "cuda-python>=12.6,<13" if most == 12 else "cuda-python>=12.6"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version.split("+")[0].split(".post")[0])))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requires() -> Sequence[str]:
    try:
        return importlib.metadata.requires("edgefg") or ()
    except importlib.metadata.PackageNotFoundError:  # run from a folder of sources
        return ()


def _read_gpu() -> Gpu:
    cuda = _driver_cuda()
    try:
        device, _ = describe_gpu()
    except RuntimeUnavailableError as exc:
        return Gpu(cuda=cuda, problem=str(exc).partition("; `edgefg doctor`")[0])
    return Gpu(name=device.name, compute_capability=device.compute_capability, memory=device.memory, cuda=cuda)


def _driver_cuda() -> str | None:
    """Ask the driver for the newest CUDA that it runs; None where there is no driver, or no cuda-python to ask with."""
    try:
        from cuda.bindings import runtime

        _, version = runtime.cudaDriverGetVersion()
    except (ImportError, RuntimeError):  # RuntimeError: libcuda is not there
        return None
    return f"{int(version) // 1000}.{int(version) % 1000 // 10}" if int(version) else None
