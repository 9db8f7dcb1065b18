"""Which machine measured: CPU, memory, operating system, versions; and how busy and how large this process is.

What a system does not tell is None, never a guess. Linux tells through ``/proc`` and ``/sys``.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path

import msgspec

# Any one of OpenCV's distributions brings the same cv2.
_DISTRIBUTIONS = {
    "edgefg": ("edgefg",),
    "numpy": ("numpy",),
    "opencv": ("opencv-python-headless", "opencv-python", "opencv-contrib-python-headless", "opencv-contrib-python"),
    "openvino": ("openvino",),
    "onnxruntime": ("onnxruntime",),
    "tensorrt": ("tensorrt",),
}


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """The machine that a report was measured on."""

    cpu: str
    """Model name of the processor, or of the board where only that is told."""
    architecture: str
    cores: int
    """Logical cores that this process may use."""
    system: str
    """Operating system and kernel."""
    governor: str | None
    """Frequency governor of core 0, for instance ``performance``."""
    memory_bytes: int | None
    python: str
    versions: dict[str, str]
    """Installed versions of edgefg, NumPy, OpenCV and the inference engines."""


def describe() -> Device:
    """Describe the machine that this process runs on."""
    return Device(
        cpu=_cpu_model(),
        architecture=platform.machine(),
        cores=_usable_cores(),
        system=platform.platform(),
        governor=_read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        memory_bytes=_memory(),
        python=platform.python_version(),
        versions=_versions(),
    )


def load_average() -> float | None:
    """Return how many processes wanted a core on average over the last minute; None where the system does not tell."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def peak_rss() -> int | None:
    """Return the most memory, in bytes, that this process has had resident."""
    # Not getrusage alone: on Linux its ru_maxrss begins with the peak of the process that started this one.
    if (peak := _status_bytes("VmHWM")) is not None:
        return peak
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def current_rss() -> int | None:
    """Return the memory, in bytes, that this process has resident now; None where the system does not tell."""
    return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int | None:
    for line in (_read("/proc/self/status") or "").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return None


def _cpu_model() -> str:
    fields: dict[str, str] = {}
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        fields[name.strip()] = value.strip()
    board = _read("/proc/device-tree/model")  # what ARM boards tell instead
    return fields.get("model name") or board or fields.get("Hardware") or platform.processor() or platform.machine()


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _versions() -> dict[str, str]:
    found = {}
    for name, distributions in _DISTRIBUTIONS.items():
        for distribution in distributions:
            try:
                found[name] = importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                continue
            break
    return found


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip("\x00\n ") or None
    except OSError:
        return None
