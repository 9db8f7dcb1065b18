"""Results of the harness: a `BenchReport` with one `Measurement` per artifact; JSON by msgspec."""

from __future__ import annotations

from typing import Literal

import msgspec

from edgefg.benchmarks.device import Device
from edgefg.benchmarks.stats import Latency
from edgefg.decision import Timings
from edgefg.evaluation.predictions import Evaluation

Frame = Literal["network", "camera"]


class ColdStart(msgspec.Struct, frozen=True, kw_only=True):
    """From nothing to the first prediction, in milliseconds, in a fresh process."""

    import_ms: float
    """``import edgefg``, NumPy included."""
    load_ms: float
    """``Classifier(path)``: hashes, engine, model; OpenVINO's model cache is used as it is."""
    first_predict_ms: float
    """The first ``predict``, OpenCV's import included."""
    process_ms: float
    """All of it, including the start of the interpreter, measured from outside."""


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """Measurements of one artifact."""

    name: str
    path: str
    precision: str
    runtime: str
    input: tuple[int, int]
    """Height and width of the network input in pixels."""
    frame: tuple[int, int]
    """Height and width of the frames in pixels."""
    size_bytes: int
    """The model's files, without manifest and golden set."""
    latency: Latency
    """Of successive calls of `Classifier.predict`."""
    stages: Timings
    """Median of each stage of `Classifier.predict`, in milliseconds."""
    images_per_second: float
    """One call after the other: 1000 / mean latency."""
    concurrent_per_second: float | None
    """Median over the rounds with `BenchReport.workers` threads on one `Classifier`; None for one thread."""
    cold_start: ColdStart
    peak_rss_bytes: int | None
    """The most memory that the artifact's process had resident."""
    evaluation: Evaluation | None = None
    """Accuracy, where data were given."""


class BenchReport(msgspec.Struct, frozen=True, kw_only=True):
    """Artifacts measured side by side."""

    measured_at: str
    """UTC, ISO 8601."""
    device: Device
    load_before: float | None
    """Load average of the last minute when the measurement began; above 0.5 per core, other processes disturbed it."""
    load_after: float | None
    iterations: int
    warmup: int
    rounds: int
    threads: int | None
    engine_device: str | None
    workers: int
    frame: Frame
    artifacts: tuple[Measurement, ...]
