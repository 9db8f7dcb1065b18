"""Diagnosis of a machine: what is installed, what opens which files, what fits together, and how to mend the rest.

    edgefg doctor

Versions are compared by `packaging` (the extra ``doctor``). Without it the report lists what is installed and missing,
and only advises to install it.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from edgefg import __version__
from edgefg.nvidia import (
    Advice,
    Gpu,
    Jetson,
    TensorRTStatus,
    advise,
    find_driver,
    find_jetson,
    fits,
    is_supported,
    read_gpu,
)
from edgefg.runtime import engines

_FOR_DEVELOPERS = ("demo", "dev")
_FOR_NVIDIA = ("tensorrt", "pycuda")
# Other packages that bring the same.
_ALSO = {"tensorrt": ("tensorrt-cu13", "tensorrt-cu12"), "cuda-python": ("cuda-bindings",)}


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Report of `diagnose`."""

    edgefg: str
    python: str
    machine: str
    cpus: int
    packages: dict[str, dict[str, str | None]]
    """By extra: each package and its version, None if it is not installed."""
    install: dict[str, str]
    """By incomplete extra: the command that installs it; `advice` has what a GPU needs."""
    driver: str | None
    """Version of NVIDIA's driver."""
    jetson: Jetson | None
    gpu: Gpu
    tensorrt: TensorRTStatus
    advice: tuple[Advice, ...]


class Machine(NamedTuple):
    """Access to a machine, so that tests can simulate one."""

    root: Path
    machine: str
    version: Callable[[str], str | None]
    """Version of an installed package."""
    requires: Callable[[], Sequence[str]]
    """The requirements of edgefg itself, as its metadata has them."""
    gpu: Callable[[], Gpu]


_INSTALL_PACKAGING = Advice("packaging is not installed, so versions are not compared", "pip install 'edgefg[doctor]'")


def this_machine() -> Machine:
    """Return access to the machine that this process runs on."""
    return Machine(Path("/"), platform.machine(), _version, _requires, read_gpu)


def usable_cpus() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def diagnose(here: Machine) -> Report:
    """Examine a machine."""
    comparable = _can_compare()
    requirements = _requirements(here)
    packages = _packages(here, requirements)
    jetson, gpu, driver = find_jetson(here.root), here.gpu(), find_driver(here.root)
    version = _find(here, "tensorrt")
    bindings = ((name, _find(here, name)) for name in ("cuda-python", "pycuda"))  # as the runtime takes them
    binding = next((f"{name} {found}" for name, found in bindings if found), None)
    tensorrt = TensorRTStatus(version=version, supported=is_supported(version) if comparable else None, binding=binding)
    return Report(
        edgefg=__version__,
        python=platform.python_version(),
        machine=here.machine,
        cpus=usable_cpus(),
        packages=packages,
        install=_install(packages),
        driver=driver,
        jetson=jetson,
        gpu=gpu,
        tensorrt=tensorrt,
        advice=(*advise(here.root, jetson, driver, gpu, tensorrt), *_outdated(requirements, packages))
        if comparable
        else (_INSTALL_PACKAGING,),
    )


def render(report: Report) -> str:
    """Return the report as text for people."""
    lines = [f"edgefg {report.edgefg}, Python {report.python}, {report.machine}, {report.cpus} CPUs"]
    if report.jetson is not None:
        lines.append(_render_jetson(report.jetson))
    lines.append(_render_gpu(report.gpu, report.driver))
    opens = engines()
    for extra, packages in report.packages.items():
        missing = [package for package, version in packages.items() if version is None]
        parts = [f"opens {', '.join(opens[extra])}"] if extra in opens else []
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


class _Requirement(NamedTuple):
    name: str
    specifier: str
    extra: str
    """``core`` if no extra brings it."""


# The form of a requirement in a package's metadata: name>=1,<2; extra == "name".
_REQUIREMENT = re.compile(
    r"(?P<name>[\w.-]+)(?:\[[^]]*\])?\s*(?P<specifier>[^;]*)(?:;.*extra == ['\"](?P<extra>[\w-]+)['\"])?"
)


def _requirements(here: Machine) -> list[_Requirement]:
    """Return the requirements of edgefg; developers' are left out."""
    found = []
    for text in here.requires():
        match = _REQUIREMENT.match(text)
        if match and match["name"] != "edgefg" and match["extra"] not in _FOR_DEVELOPERS:
            found.append(_Requirement(match["name"], match["specifier"].strip(), match["extra"] or "core"))
    return found


def _packages(here: Machine, requirements: list[_Requirement]) -> dict[str, dict[str, str | None]]:
    """List the required packages by extra, with their installed versions."""
    found: dict[str, dict[str, str | None]] = {"core": {}} if requirements else {}
    for requirement in requirements:
        found.setdefault(requirement.extra, {})[requirement.name] = _find(here, requirement.name)
    return found


def _find(here: Machine, package: str) -> str | None:
    """Return a package's version, by any of its names."""
    return next(filter(None, map(here.version, (package, *_ALSO.get(package, ())))), None)


def _install(packages: dict[str, dict[str, str | None]]) -> dict[str, str]:
    incomplete = [extra for extra, found in packages.items() if None in found.values() and extra not in _FOR_NVIDIA]
    return {
        extra: f"pip install 'edgefg[{extra}]'" if extra != "core" else "pip install edgefg" for extra in incomplete
    }


def _can_compare() -> bool:
    try:
        import packaging  # noqa: F401
    except ImportError:
        return False
    return True


def _outdated(requirements: list[_Requirement], packages: dict[str, dict[str, str | None]]) -> list[Advice]:
    """Compare the installed versions with edgefg's requirements; `edgefg.nvidia.advise` judges TensorRT."""
    found: dict[str, Advice] = {}
    for name, specifier, extra in requirements:
        version = packages[extra][name]
        if version is not None and name != "tensorrt" and not fits(version, specifier):
            finding = f"{name} {version} does not fit; edgefg needs {specifier}"
            found[name] = Advice(finding, f"pip install --upgrade '{name}{specifier}'")
    return list(found.values())


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
