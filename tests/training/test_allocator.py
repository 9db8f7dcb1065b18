from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_PROGRAM = """
import torch
from edgefg.benchmarks.device import current_rss
from edgefg.training.allocator import keep_freed_memory, release_freed_memory
assert keep_freed_memory()
blocks = [torch.ones(2**18) for _ in range(200)]  # 1 MiB each
last = torch.ones(2**18)  # the heap's end stays in use
del blocks
kept = current_rss()
assert release_freed_memory()
print((kept - current_rss()) / 2**20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_what_was_kept_is_handed_back_before_a_fork() -> None:
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 150
