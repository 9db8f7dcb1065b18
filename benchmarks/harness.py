"""Benchmark of artifacts side by side: cold start, latency, throughput, memory and, given data, accuracy.

Each artifact lives in a fresh process of its own (`edgefg.benchmarks.worker`), so that import, load, first prediction
and peak memory are its own. The processes take turns, one round each, so that other load on the machine affects all of
them alike.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Sequence
from pathlib import Path

import msgspec

from edgefg.artifact.manifest import Manifest, read_manifest
from edgefg.benchmarks.device import describe, load_average
from edgefg.benchmarks.measurement import BenchReport, ColdStart, Frame, Measurement
from edgefg.benchmarks.process import MeasuringProcess
from edgefg.benchmarks.stats import percentile, summarize_latency
from edgefg.benchmarks.worker import MeasuringJob, Round, RoundResult
from edgefg.classifier import Classifier
from edgefg.data import load_split
from edgefg.decision import Timings
from edgefg.errors import DataError
from edgefg.evaluation.predictions import Evaluation, evaluate
from edgefg.image_io import read_image
from edgefg.log import get_logger
from edgefg.progress import track

_log = get_logger(__name__)
_PHOTOGRAPHS = 8


def bench(
    paths: Sequence[Path],
    *,
    data: Path | None = None,
    split: str | None = None,
    iterations: int = 200,
    warmup: int = 20,
    rounds: int = 5,
    threads: int | None = None,
    device: str | None = None,
    frame: Frame = "network",
    workers: int = 1,
    seconds: float | None = None,
    skip_corrupt: bool = False,
) -> BenchReport:
    """Measure artifacts side by side.

    Args:
        paths: model files; each one's manifest lies beside it.
        data: labelled images. They add accuracy, and the latency is measured on a few of them instead of on a generated
            frame.
        split: which of their splits; see `edgefg.evaluation.predictions.evaluate`.
        iterations: timed predictions of each artifact, distributed over the rounds.
        warmup: predictions before the timed ones of each round.
        rounds: turns of each artifact; at most ``iterations``.
        threads: CPU threads of the engine; None leaves it to the engine.
        device: the engine's device; None is its default.
        frame: ``network``: frames of the network's size; ``camera``: 1280×720, preprocessing included.
        workers: more than 1 also measures throughput with that many threads on one `Classifier`.
        seconds: most time for an artifact's timed predictions; each round ends after its share.
        skip_corrupt: leave unreadable images out instead of raising.

    Raises:
        EdgefgError: an artifact or the data cannot be used.
        ValueError: there is no artifact, or a number is out of range.
    """
    if not paths:
        raise ValueError("there is no artifact to measure; give at least one")
    if frame not in ("network", "camera"):
        raise ValueError(f"the frame is {frame!r}; choose 'network' or 'camera'")
    manifests = [read_manifest(path) for path in paths]
    turns = _turns(iterations, warmup, rounds, seconds, workers)
    images = _photographs(data, split, manifests, skip_corrupt) if data is not None else ()
    load_before = load_average()
    jobs = [MeasuringJob(path=str(p), threads=threads, device=device, frame=frame, images=images) for p in paths]
    measured = _measure(jobs, manifests, turns)
    load_after = load_average()
    if data is not None:
        for i, path in enumerate(paths):
            _log.info("accuracy of %s", path)
            evaluation = _evaluate(path, data, split, threads, device, skip_corrupt)
            measured[i] = msgspec.structs.replace(measured[i], evaluation=evaluation)
    return BenchReport(
        measured_at=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        device=describe(),
        load_before=load_before,
        load_after=load_after,
        iterations=iterations,
        warmup=warmup,
        rounds=len(turns),
        threads=threads,
        engine_device=device,
        workers=workers,
        frame=frame,
        artifacts=tuple(measured),
    )


def model_bytes(manifest: Manifest) -> int:
    """Return the size of the model's files, without manifest and golden set."""
    golden = manifest.golden.file if manifest.golden else None
    return sum(file.size for file in manifest.files if file.name != golden)


def _turns(iterations: int, warmup: int, rounds: int, seconds: float | None, workers: int) -> list[Round]:
    """Distribute the timed predictions over the rounds; the first rounds get the remainder."""
    if min(iterations, rounds, workers) < 1 or warmup < 0 or (seconds is not None and seconds <= 0):
        raise ValueError("iterations, rounds and workers must be at least 1, warmup at least 0 and seconds above 0")
    rounds = min(rounds, iterations)
    share = None if seconds is None else seconds / rounds
    counts = [iterations // rounds + (number < iterations % rounds) for number in range(rounds)]
    return [Round(iterations=count, warmup=warmup, seconds=share, workers=workers) for count in counts]


def _measure(jobs: Sequence[MeasuringJob], manifests: Sequence[Manifest], turns: Sequence[Round]) -> list[Measurement]:
    """Start all processes, one after the other, and let them take turns."""
    with contextlib.ExitStack() as stack:
        processes = []
        for job in jobs:
            _log.info("cold start of %s", job.path)
            processes.append(stack.enter_context(MeasuringProcess(job)))
        results: list[list[RoundResult]] = [[] for _ in jobs]
        for number, turn in enumerate(track(turns, "measuring", len(turns))):
            # There and back again, so that a drift of the clock frequency favours neither end of the list.
            for i in range(len(jobs)) if number % 2 == 0 else reversed(range(len(jobs))):
                results[i].append(processes[i].run(turn))
    return [_measurement(*of) for of in zip(_names(jobs), jobs, manifests, processes, results, strict=True)]


def _names(jobs: Sequence[MeasuringJob]) -> list[str]:
    """Name each artifact by its folder and file, or by its whole path if that is ambiguous."""
    short = [f"{path.resolve().parent.name}/{path.name}" for path in (Path(job.path) for job in jobs)]
    return short if len(set(short)) == len(short) else [job.path for job in jobs]


def _measurement(
    name: str, job: MeasuringJob, manifest: Manifest, process: MeasuringProcess, results: Sequence[RoundResult]
) -> Measurement:
    ready = process.ready
    latency = summarize_latency([result.total for result in results])
    concurrent = [r.concurrent_per_second for r in results if r.concurrent_per_second is not None]
    return Measurement(
        name=name,
        path=job.path,
        precision=manifest.precision,
        runtime=ready.runtime,
        input=(manifest.input.height, manifest.input.width),
        frame=ready.frame,
        size_bytes=model_bytes(manifest),
        latency=latency,
        stages=Timings(
            preprocess=percentile([ms for result in results for ms in result.preprocess], 50),
            infer=percentile([ms for result in results for ms in result.infer], 50),
            decide=percentile([ms for result in results for ms in result.decide], 50),
        ),
        images_per_second=1e3 / latency.mean,
        concurrent_per_second=percentile(concurrent, 50) if concurrent else None,
        cold_start=ColdStart(
            import_ms=ready.import_ms,
            load_ms=ready.load_ms,
            first_predict_ms=ready.first_predict_ms,
            process_ms=process.start_ms,
        ),
        peak_rss_bytes=results[-1].peak_rss,
    )


def _evaluate(
    path: Path, data: Path, split: str | None, threads: int | None, device: str | None, skip_corrupt: bool
) -> Evaluation:
    with Classifier(path, threads=threads, device=device) as classifier:
        return evaluate(classifier, data, split, skip_corrupt=skip_corrupt)


def _photographs(data: Path, split: str | None, manifests: Sequence[Manifest], skip_corrupt: bool) -> tuple[str, ...]:
    """Choose photographs from all over the split. Data that do not fit raise here, before anything is measured."""
    # Most artifacts that are compared are of the same data, and where they are split here every image is read.
    origins = dict.fromkeys((found.labels, found.provenance.split, found.provenance.dataset) for found in manifests)
    for labels, spec, dataset in origins:
        _, images = load_split(data, split, labels, spec, trained_on=dataset, skip_corrupt=skip_corrupt)
    chosen = []
    for image in images[:: max(1, len(images) // _PHOTOGRAPHS)][:_PHOTOGRAPHS]:
        try:
            read_image(image.path)
        except DataError:
            if not skip_corrupt:
                raise
        else:
            chosen.append(str(image.path))
    return tuple(chosen)
