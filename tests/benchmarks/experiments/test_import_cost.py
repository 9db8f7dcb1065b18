from __future__ import annotations

import sys

import msgspec
import pytest

from edgefg.benchmarks.experiments import import_cost


def test_prints_a_table_then_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["import_cost", "--runs", "1"])
    import_cost.main()
    *lines, last = capsys.readouterr().out.splitlines()
    cost = msgspec.json.decode(last, type=import_cost.ImportCost)
    assert lines[2].startswith("on top of import numpy")
    assert cost.runs == 1
    assert cost.edgefg_ms > 0
    assert cost.modules > 5
    assert cost.numpy_bytes > 1_000_000
