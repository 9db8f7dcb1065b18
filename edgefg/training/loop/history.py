"""The record of a run: one log line per epoch, and the same figures in a CSV file and for TensorBoard."""

from __future__ import annotations

import csv
import time
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from edgefg.log import get_logger
from edgefg.metrics import Scores

_log = get_logger(__name__)
_SCORES = ("top1", "top1_low", "top1_high", "balanced", "ece")
_COLUMNS = ("epoch", "loss", "lr", *_SCORES, "seconds")


class History:
    """Writes ``<name>.csv`` and ``tensorboard/<name>/`` into a folder.

    Args:
        out: the folder.
        name: name of the run.
        done: epochs that are done. Later rows, of an attempt that was killed, are dropped.
        active: False on all processes but the first, which then write nothing.
    """

    def __init__(self, out: Path, name: str, done: int, *, active: bool) -> None:
        self._active = active
        self._name = name
        if not active:
            return
        out.mkdir(parents=True, exist_ok=True)
        self._csv = out / f"{name}.csv"
        rows = []
        if done and self._csv.is_file():
            with self._csv.open(newline="") as file:
                rows = list(csv.reader(file))[1 : 1 + done]
        with self._csv.open("w", newline="") as file:
            csv.writer(file).writerows([_COLUMNS, *rows])
        self._tensorboard = SummaryWriter(str(out / "tensorboard" / name), purge_step=done + 1)
        self._since = time.monotonic()

    def add(self, epoch: int, loss: float, lr: float, scores: Scores | None) -> None:
        """Record an epoch, counted from 1. ``scores`` is None if it was not scored."""
        if not self._active:
            return
        now = time.monotonic()
        seconds, self._since = now - self._since, now
        figures = {"loss": loss, "lr": lr, "seconds": seconds}
        if scores is not None:
            figures |= {name: getattr(scores, name) for name in _SCORES}
        row = [epoch, *(f"{figures[name]:.6g}" if name in figures else "" for name in _COLUMNS[1:])]
        with self._csv.open("a", newline="") as file:
            csv.writer(file).writerow(row)
        for name, value in figures.items():
            self._tensorboard.add_scalar(name, value, epoch)
        on_val = f", val top-1 {scores.top1:.1%}" if scores is not None else ""
        _log.info("%s epoch %d: loss %.3f%s, %.0f s", self._name, epoch, loss, on_val, seconds)

    def close(self) -> None:
        """Flush and close the files."""
        if self._active:
            self._tensorboard.close()
