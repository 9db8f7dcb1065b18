from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edgefg.benchmarks import device

_PROC = Path("/proc/self/status").exists()


def test_describes_this_machine() -> None:
    found = device.describe()
    assert found.cpu
    assert 1 <= found.cores <= (os.cpu_count() or 1)
    assert found.versions["numpy"] == importlib.metadata.version("numpy")
    assert found.versions.keys() >= {"edgefg", "opencv"}
    assert msgspec.json.decode(msgspec.json.encode(found), type=device.Device) == found


def test_memory_needs_psutil(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (device.describe().memory_bytes or 0) > 1 << 28
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert device.describe().memory_bytes is None


def test_a_machine_that_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_read", lambda path: None)
    monkeypatch.delattr(os, "getloadavg")
    found = device.describe()
    assert found.cpu  # platform's word for it
    assert found.governor is None
    assert device.load_average() is None
    assert (device.peak_rss() or 0) > 1_000_000  # getrusage


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"/proc/cpuinfo": "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n"}, "Some CPU @ 2 GHz"),
        ({"/proc/cpuinfo": "processor\t: 0\n", "/proc/device-tree/model": "Some Board Rev 1"}, "Some Board Rev 1"),
    ],
)
def test_names_processor_or_board(files: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_read", files.get)
    assert device.describe().cpu == expected


@pytest.mark.skipif(not _PROC, reason="needs /proc")
def test_peak_memory_is_not_the_parents() -> None:
    held = np.ones(300_000_000 // 8)  # resident here, not in the child
    script = "from edgefg.benchmarks.device import peak_rss; print(peak_rss())"
    child = int(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout)
    here = device.peak_rss()
    assert here is not None
    assert here >= held.nbytes > child
