"""Description of the machine that measures: CPU, memory, operating system, versions, load.

What cannot be found out is None, never a guess. The size of the memory needs psutil (the extra ``bench``).
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from pathlib import Path

import msgspec

from edgefg.doctor import usable_cpus
from edgefg.runtime import engines

# Any one of OpenCV's distributions brings the same cv2.
_DISTRIBUTIONS = {
    "edgefg": ("edgefg",),
    "numpy": ("numpy",),
    "opencv": ("opencv-python-headless", "opencv-python", "opencv-contrib-python-headless", "opencv-contrib-python"),
}


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """The machine that a report was measured on."""

    cpu: str
    """Model name of the processor, or of the board if only that is known."""
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
        cores=usable_cpus(),
        system=platform.platform(),
        governor=_read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        memory_bytes=_memory(),
        python=platform.python_version(),
        versions=_versions(),
    )


def load_average() -> float | None:
    """Return the average number of processes that wanted a core in the last minute; None if it is not known."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def peak_rss() -> int | None:
    """Return the peak resident memory of this process, in bytes."""
    # On Linux, ru_maxrss of getrusage begins with the peak of the process that started this one.
    if found := re.search(r"^VmHWM:\s*(\d+) kB", _read("/proc/self/status") or "", re.MULTILINE):
        return int(found[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _cpu_model() -> str:
    fields: dict[str, str] = {}
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        fields[name.strip()] = value.strip()
    board = _read("/proc/device-tree/model")  # of ARM boards
    return fields.get("model name") or board or fields.get("Hardware") or platform.processor() or platform.machine()


def _memory() -> int | None:
    try:
        import psutil
    except ImportError:
        return None
    return int(psutil.virtual_memory().total)


def _versions() -> dict[str, str]:
    found = {}
    # The extra of an engine is called like its distribution.
    for name, distributions in (_DISTRIBUTIONS | {engine: (engine,) for engine in engines()}).items():
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
