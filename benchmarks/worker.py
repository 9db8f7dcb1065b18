"""The process that measures one artifact, started by `edgefg.benchmarks.process`: cold start first, then rounds.

It takes a `MeasuringJob` as JSON in its first argument and answers with one JSON line (`Ready` or `Failure`). Then it
answers each `Round` line with one `RoundResult` line, until its input ends. Between rounds it sleeps, so that several
of them take turns on one machine.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import msgspec
import numpy as np

from edgefg.benchmarks.device import peak_rss
from edgefg.classifier import Classifier
from edgefg.decision import Prediction
from edgefg.errors import EdgefgError
from edgefg.image_io import read_image
from edgefg.preprocess import InputSpec, UInt8Array, crop, resize

CAMERA = (720, 1280)
# The interpreter has imported nothing of edgefg when the clock starts; `python -m` would have.
BOOTSTRAP = """
import time; start = time.perf_counter()
import edgefg; seconds = time.perf_counter() - start
from edgefg.benchmarks.worker import main; main(seconds)
"""


class MeasuringJob(msgspec.Struct, frozen=True, kw_only=True):
    """The artifact to measure, and how."""

    path: str
    threads: int | None
    device: str | None
    frame: str
    """``network`` or ``camera``."""
    images: tuple[str, ...]
    """Photographs to measure on, each brought to the frame's size; none: a generated frame."""


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The cold start, in milliseconds, and the engine."""

    import_ms: float
    load_ms: float
    first_predict_ms: float
    runtime: str
    frame: tuple[int, int]
    """Height and width of the frames in pixels."""


class Failure(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """An `EdgefgError`, by the name of its class."""

    kind: str
    message: str


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """One round."""

    iterations: int
    """Timed predictions."""
    warmup: int
    """Predictions before them."""
    seconds: float | None
    """Most time for the timed predictions, and likewise for those before them."""
    workers: int
    """More than 1: as many predictions again, from that many threads."""


class RoundResult(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Measurements of a round, in milliseconds, one entry per prediction."""

    total: list[float]
    preprocess: list[float]
    infer: list[float]
    decide: list[float]
    concurrent_per_second: float | None
    """Images a second with `Round.workers` threads; None for one."""
    peak_rss: int | None
    """Bytes, since the process began."""


def main(import_seconds: float) -> None:
    """Answer the harness until it closes the pipe. ``import_seconds`` is what ``import edgefg`` took."""
    # Prints of the engines must not end up between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    job = msgspec.json.decode(sys.argv[1], type=MeasuringJob)
    try:
        _serve(job, import_seconds, answers)
    except EdgefgError as exc:
        _send(answers, Failure(kind=type(exc).__name__, message=str(exc)))
    except KeyboardInterrupt:  # the harness got it too, and speaks for both
        os._exit(130)


def _serve(job: MeasuringJob, import_seconds: float, answers: IO[bytes]) -> None:
    start = time.perf_counter()
    with Classifier(job.path, threads=job.threads, device=job.device) as classifier:
        loaded = time.perf_counter()
        size = frame_size(job.frame, classifier.manifest.input)
        frames = [_generated(*size)]
        before = time.perf_counter()
        classifier.predict(frames[0])
        first = time.perf_counter() - before
        ready = Ready(
            import_ms=import_seconds * 1e3,
            load_ms=(loaded - start) * 1e3,
            first_predict_ms=first * 1e3,
            runtime=classifier.runtime_version,
            frame=size,
        )
        _send(answers, ready)
        # Only now, so that the cold start pays for its own import of OpenCV.
        frames = [_photograph(Path(path), *size) for path in job.images] or frames
        for line in sys.stdin.buffer:
            _send(answers, run_round(classifier, frames, msgspec.json.decode(line, type=Round)))


def run_round(classifier: Classifier, frames: list[UInt8Array], turn: Round) -> RoundResult:
    """Run one round on ``frames``, repeatedly, and time each prediction."""
    endless = itertools.cycle(frames)
    for _ in _limited(turn.warmup, turn.seconds):
        classifier.predict(next(endless))
    total: list[float] = []
    predictions: list[Prediction] = []
    for _ in _limited(turn.iterations, turn.seconds):
        frame = next(endless)
        start = time.perf_counter()
        prediction = classifier.predict(frame)
        total.append((time.perf_counter() - start) * 1e3)
        predictions.append(prediction)
    return RoundResult(
        total=total,
        preprocess=[prediction.timings.preprocess for prediction in predictions],
        infer=[prediction.timings.infer for prediction in predictions],
        decide=[prediction.timings.decide for prediction in predictions],
        concurrent_per_second=_concurrent(classifier, frames, len(total), turn.workers) if turn.workers > 1 else None,
        peak_rss=peak_rss(),
    )


def frame_size(frame: str, spec: InputSpec) -> tuple[int, int]:
    """Return height and width of the frames to measure on."""
    return CAMERA if frame == "camera" else (spec.height, spec.width)


def _limited(count: int, seconds: float | None) -> Iterator[int]:
    """Count up to ``count``, but stop when the time is over, after at least one."""
    end = None if seconds is None else time.perf_counter() + seconds
    for i in range(count):
        if i > 0 and end is not None and time.perf_counter() >= end:
            return
        yield i


def _concurrent(classifier: Classifier, frames: list[UInt8Array], count: int, workers: int) -> float:
    work = list(itertools.islice(itertools.cycle(frames), max(count, workers)))
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(classifier.predict, work[:workers]))  # each thread's first prediction may build a request
        start = time.perf_counter()
        list(pool.map(classifier.predict, work))
        return len(work) / (time.perf_counter() - start)


def _generated(height: int, width: int) -> UInt8Array:
    """Make a frame with detail everywhere; a network takes as long for any other."""
    return (
        (np.arange(height * width * 3, dtype=np.uint32) * 2654435761 >> 13).astype(np.uint8).reshape(height, width, 3)
    )


def _photograph(path: Path, height: int, width: int) -> UInt8Array:
    image = crop(read_image(path), InputSpec(height=height, width=width))
    return np.ascontiguousarray(resize(image, height, width))


def _send(answers: IO[bytes], message: Ready | Failure | RoundResult) -> None:
    answers.write(msgspec.json.encode(message) + b"\n")
    answers.flush()
