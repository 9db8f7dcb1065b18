"""The side-by-side run of teachers: what it plans, and what it makes of checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgefg.benchmarks.teachers import INGREDIENTS, METHODS, collect, render, runs


def checkpoint(folder: Path, top1: float) -> None:
    """Write a safetensors file without tensors: all that is read is its header."""
    folder.mkdir(parents=True)
    inner = json.dumps({"validation": {"top1": top1, "balanced": top1 / 2, "images": 10, "data": "x"}})
    outer = json.dumps({"__metadata__": {"edgefg": inner}}).encode()
    (folder / "teacher.safetensors").write_bytes(len(outer).to_bytes(8, "little") + outer)


def test_methods_run_on_every_fold_and_ingredients_on_the_first() -> None:
    planned = runs([*METHODS, *INGREDIENTS], [0, 1, 2])
    assert len(planned) == 3 * len(METHODS) + len(INGREDIENTS)
    assert [run.fold for run in planned] == sorted(run.fold for run in planned)
    assert {run.row for run in planned if run.fold} == set(METHODS)


def test_the_table_has_each_fold_s_difference_from_plain(tmp_path: Path) -> None:
    planned = runs(["plain", "bcnn", "cutmix"], [0, 1])
    for run, top1 in zip(planned, (0.5, 0.6, 0.4, 0.7, 0.75), strict=True):
        checkpoint(run.folder(tmp_path), top1)
    rows = {row.name: row for row in collect(planned, tmp_path)}
    assert rows["bcnn"].gain == pytest.approx([0.1, 0.05])
    assert rows["cutmix"].gain == pytest.approx([-0.1])
    table = render(list(rows.values()))
    assert "| bcnn | 67.5 % (2 folds) | 33.8 % | +10.0, +5.0 |" in table
    assert table.index("| bcnn") < table.index("| plain") < table.index("| cutmix")


def test_what_is_not_done_is_left_out(tmp_path: Path) -> None:
    assert collect(runs(["plain", "se"], [0]), tmp_path) == []
