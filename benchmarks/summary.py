"""Summary of `edgefg pipeline` and `make demo`: accuracy, latency and size of the artifacts, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from edgefg.benchmarks.harness import bench
from edgefg.benchmarks.measurement import BenchReport, Measurement
from edgefg.benchmarks.report import megabytes, top1_text
from edgefg.errors import DataError
from edgefg.evaluation.tables import table
from edgefg.files import write_json
from edgefg.metrics import Scores


class SummaryRow(msgspec.Struct, frozen=True, kw_only=True):
    """One artifact, all figures measured through `Classifier`."""

    name: str
    path: str
    precision: str
    scores: Scores
    p50_ms: float
    p99_ms: float
    size_bytes: int
    """The model's files, without manifest and golden set."""


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """Accuracy, latency and size of a pipeline's artifacts."""

    data: str
    split: str
    rows: tuple[SummaryRow, ...]
    bench: BenchReport
    """All measurements, with the machine and its load."""


def summarize(
    artifacts: Sequence[tuple[str, Path]],
    data: Path,
    split: str | None = None,
    *,
    iterations: int = 200,
    threads: int | None = None,
    skip_corrupt: bool = False,
) -> Summary:
    """Measure named artifacts side by side on a split.

    Args:
        artifacts: name and model file of each, in the table's order.
        data: labelled images; latency is measured on frames of each network's own size.
        split: which split; None takes ``test`` if the data have it, else ``val``.
        iterations: timed predictions of each artifact.
        threads: CPU threads of the engines.
        skip_corrupt: leave unreadable images out instead of raising.

    Raises:
        EdgefgError: an artifact or the data cannot be used.
    """
    report = bench(
        [path for _, path in artifacts],
        data=data,
        split=split,
        iterations=iterations,
        threads=threads,
        skip_corrupt=skip_corrupt,
    )
    rows = tuple(_row(name, measured) for (name, _), measured in zip(artifacts, report.artifacts, strict=True))
    evaluation = report.artifacts[0].evaluation
    assert evaluation is not None  # data were given
    return Summary(data=str(data), split=evaluation.split, rows=rows, bench=report)


def render(summary: Summary) -> str:
    """Lay the summary out as an aligned table."""
    return table(
        [
            {
                "model": row.name,
                "top-1 [95 %]": top1_text(row.scores),
                "balanced": f"{row.scores.balanced:.1%}",
                "p50 ms": f"{row.p50_ms:.2f}",
                "p99 ms": f"{row.p99_ms:.2f}",
                "size MB": megabytes(row.size_bytes),
            }
            for row in summary.rows
        ]
    )


def write(summary: Summary, path: Path) -> None:
    """Write the summary atomically as indented JSON. Raises `DataError` if it cannot be written."""
    try:
        write_json(path, summary)
    except OSError as exc:
        raise DataError(f"cannot write {path}: {exc.strerror}; an earlier file there does not change") from exc


def _row(name: str, measured: Measurement) -> SummaryRow:
    evaluation = measured.evaluation
    assert evaluation is not None  # data were given
    return SummaryRow(
        name=name,
        path=measured.path,
        precision=measured.precision,
        scores=evaluation.scores,
        p50_ms=measured.latency.p50,
        p99_ms=measured.latency.p99,
        size_bytes=measured.size_bytes,
    )
