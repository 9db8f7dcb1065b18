"""The side-by-side run of teachers: what it plans, and what it makes of checkpoints."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from edgefg.benchmarks.experiments.teachers import INGREDIENTS, METHODS, collect, main, render, runs


def checkpoint(folder: Path, top1: float, epochs: int = 10) -> None:
    """Write a safetensors file without tensors: all that is read is its header."""
    folder.mkdir(parents=True)
    training = {"image_size": 128, "schedule": {"epochs": epochs, "val_every": 10}}
    stage = {"kind": "train", "method": "plain", "backbone": "lite0", "weights": {"source": "x"}, "training": training}
    validation = {"top1": top1, "balanced": top1 / 2, "images": 10, "data": "x"}
    inner = json.dumps({"validation": validation, "stages": [stage]})
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


def test_means_are_over_the_folds_that_plain_has_too(tmp_path: Path) -> None:
    planned = runs(["plain", "bcnn", "se"], [0, 1, 2])
    for run, top1 in zip(planned, (0.5, 0.6, None, None, 0.9, None, 0.7, 0.8, None), strict=True):
        if top1:
            checkpoint(run.folder(tmp_path), top1)
    checkpoint(tmp_path / "se" / "fold-1", 0.9)
    rows = {row.name: row for row in collect(planned, tmp_path)}
    assert rows["bcnn"].folds == rows["plain"].folds == [0, 2]
    table = render(list(rows.values()))
    assert "| bcnn | 70.0 % (2 folds) | 35.0 % | +10.0, +10.0 |" in table
    assert "| se | – (0 folds) | – | – |" in table
    # Plain is what a row is compared with, also where it is not asked for itself.
    assert [row.gain for row in collect(runs(["bcnn"], [0]), tmp_path)] == [pytest.approx([0.1])]


def test_bad_input_ends_2_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fold-0.csv").touch()
    checkpoint(tmp_path / "bcnn" / "fold-0", 0.6)
    checkpoint(tmp_path / "plain" / "fold-0", 0.5)

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["teachers", str(tmp_path), "--out", str(tmp_path), *arguments])
        try:
            main()
        except SystemExit as exit_:
            return int(exit_.code or 0), capsys.readouterr().err
        return 0, capsys.readouterr().out

    status, said = call("--rows", "plain,bccn")
    assert (status, len(said.splitlines())) == (2, 1)
    assert "there is no row 'bccn'; choose from plain, wsdan" in said
    for rows in ("bcnn", "se"):  # se is compared with plain, which is there
        status, said = call("--rows", rows, "--epochs", "20")
        assert (status, len(said.splitlines())) == (2, 1)
        assert "was trained for 10 epochs at 128 px, not 20 at 128. Give another --out" in said
    status, said = call("--rows", "bcnn", "--report")
    assert status == 0
    assert "| bcnn | 60.0 % (1 folds) | 30.0 % | +10.0 |" in said
