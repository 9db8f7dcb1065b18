from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from edgefg.data.split import Sample
from edgefg.preprocess import InputSpec
from edgefg.settings.training import Schedule, TrainingConfig
from edgefg.training.data import loader
from edgefg.training.data.augment import EvaluationImages, TrainingImages

_PROGRAM = """
import torch
import psutil
from edgefg.training.allocator import keep_freed_memory, release_freed_memory
assert keep_freed_memory()
blocks = [torch.ones(2**18) for _ in range(200)]  # 1 MiB each
last = torch.ones(2**18)  # the heap's end stays in use
del blocks
kept = psutil.Process().memory_info().rss
assert release_freed_memory()
print((kept - psutil.Process().memory_info().rss) / 2**20)
"""


@pytest.mark.parametrize(("workers", "times"), [(0, 0), (1, 2)])
def test_both_loaders_do_so_before_they_fork(monkeypatch: pytest.MonkeyPatch, workers: int, times: int) -> None:
    samples, spec = [Sample(Path("a.jpg"), 0), Sample(Path("b.jpg"), 1)], InputSpec(height=32, width=32)
    calls: list[None] = []
    monkeypatch.setattr(loader, "release_freed_memory", lambda: calls.append(None))
    loader.training_loader(
        TrainingImages(samples, spec),
        TrainingConfig(image_size=32, schedule=Schedule(epochs=1)),
        workers=workers,
        seed=0,
    )
    loader.evaluation_loader(EvaluationImages(samples, spec), 2, workers=workers)
    assert len(calls) == times


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_what_was_kept_is_handed_back_before_a_fork() -> None:
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 150
