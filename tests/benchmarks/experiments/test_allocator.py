"""The experiment on the allocator: what it prints, and that it trains."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from edgefg.benchmarks.experiments import allocator


def test_rounds_take_turns_and_give_the_median_ratio(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    speeds, asked = iter([b"10", b"13", b"10", b"12", b"10", b"20"]), []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        asked.append(command[-1])
        return subprocess.CompletedProcess(command, 0, stdout=next(speeds))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["allocator"])
    allocator.main()
    assert asked == ["0", "1"] * 3
    assert capsys.readouterr().out.splitlines()[-1] == "median 1.30× (1.20–2.00)"


@pytest.mark.slow
def test_it_trains() -> None:
    assert allocator.images_per_second(False, 1) > 0
