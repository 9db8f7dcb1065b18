"""Whether memory leaks, from how much of it was in use after each of several blocks of work.

One difference tells nothing: a Jetson's GPU has the whole system's memory, of which other programs take and give back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

from edgefg.runtimes.cuda import describe_gpu

BLOCKS = 5


def levels(work: Callable[[], object]) -> tuple[list[int], list[int]]:
    """Do the work in five blocks; return the GPU's bytes in use, and this process's, before them and after each."""
    found = [(_used(), _resident())]
    for _ in range(BLOCKS):
        work()
        found.append((_used(), _resident()))
    return [gpu for gpu, _ in found], [resident for _, resident in found]


def leaks(found: Sequence[int], least: int) -> bool:
    """Tell whether every block took more, and all of them together at least ``least`` bytes."""
    return all(before < after for before, after in pairwise(found)) and found[-1] - found[0] >= least


def _used() -> int:
    device, free = describe_gpu()
    return device.memory - free


def _resident() -> int:
    """Return this process's resident memory in bytes."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
