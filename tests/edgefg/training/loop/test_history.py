from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from edgefg import metrics
from edgefg.training.loop.history import History


def rows(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "teacher.csv").read_text().splitlines()))


def scores() -> metrics.Scores:
    return metrics.score(np.eye(4, dtype=np.float32), np.array([0, 1, 2, 0]), classes=4)


def test_an_epoch_is_logged_and_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "edgefg")
    history = History(tmp_path, "teacher", 0, active=True)
    history.add(1, 1.25, 0.001, scores())
    history.add(2, 1.0, 0.0005, None)
    history.close()
    assert caplog.messages == ["teacher epoch 1: loss 1.250, val top-1 75.0%, 0 s", "teacher epoch 2: loss 1.000, 0 s"]
    first, second = rows(tmp_path)
    assert (first["epoch"], first["loss"], first["lr"], first["top1"]) == ("1", "1.25", "0.001", "0.75")
    assert (second["epoch"], second["top1"]) == ("2", "")
    assert list((tmp_path / "tensorboard" / "teacher").iterdir())


def test_a_resumed_run_drops_the_rows_of_epochs_that_are_not_done(tmp_path: Path) -> None:
    history = History(tmp_path, "teacher", 0, active=True)
    for epoch in (1, 2, 3):
        history.add(epoch, float(epoch), 0.1, None)
    history.close()
    history = History(tmp_path, "teacher", 1, active=True)
    history.add(2, 9.0, 0.1, None)
    history.close()
    assert [row["loss"] for row in rows(tmp_path)] == ["1", "9"]


def test_other_processes_write_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "edgefg")
    history = History(tmp_path / "out", "teacher", 0, active=False)
    history.add(1, 1.0, 0.1, None)
    history.close()
    assert not (tmp_path / "out").exists()
    assert caplog.messages == []
