"""What a run leaves to read: one line an epoch on the screen and in a CSV file, the same figures for TensorBoard."""

from __future__ import annotations

import csv
import sys
import time
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from edgefg.metrics import Scores

_COLUMNS = ("epoch", "loss", "lr", "top1", "top1_low", "top1_high", "balanced", "ece", "seconds")


class History:
    """Writes ``<stage>.csv`` and ``tensorboard/<stage>/`` into a folder; goes on after a resumed epoch.

    Args:
        out: the folder.
        stage: name of the run.
        done: epochs that are done already; later lines of an earlier try are dropped.
        active: False on all but the first process.
    """

    def __init__(self, out: Path, stage: str, done: int, *, active: bool) -> None:
        self._active = active
        self._stage = stage
        if not active:
            return
        out.mkdir(parents=True, exist_ok=True)
        self._csv = out / f"{stage}.csv"
        kept = []
        if done and self._csv.is_file():
            with self._csv.open(newline="") as file:
                kept = list(csv.reader(file))[1 : 1 + done]
        with self._csv.open("w", newline="") as file:
            csv.writer(file).writerows([_COLUMNS, *kept])
        self._board = SummaryWriter(str(out / "tensorboard" / stage), purge_step=done + 1)
        self._since = time.monotonic()

    def add(self, epoch: int, loss: float, rate: float, scores: Scores | None) -> None:
        """Record one epoch."""
        if not self._active:
            return
        now = time.monotonic()
        seconds, self._since = now - self._since, now
        figures = {"loss": loss, "lr": rate, "seconds": seconds}
        if scores is not None:
            figures |= {name: getattr(scores, name) for name in _COLUMNS if hasattr(scores, name)}
        row = [epoch, *(f"{figures[name]:.6g}" if name in figures else "" for name in _COLUMNS[1:])]
        with self._csv.open("a", newline="") as file:
            csv.writer(file).writerow(row)
        for name, value in figures.items():
            self._board.add_scalar(name, value, epoch)
        on_val = f", val top-1 {scores.top1:.1%}" if scores is not None else ""
        # On standard error: what a command prints is its answer, JSON where that was asked for.
        line = f"{self._stage} epoch {epoch}: loss {loss:.3f}{on_val}, {seconds:.0f} s"
        print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Flush and close."""
        if self._active:
            self._board.close()
