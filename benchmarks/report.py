"""Benchmark reports as plain text tables, for people; programs read the JSON."""

from __future__ import annotations

import msgspec

from edgefg.benchmarks.measurement import BenchReport, Measurement
from edgefg.evaluation.tables import table
from edgefg.metrics import Scores


def json_line(report: msgspec.Struct) -> str:
    """Encode a report as JSON without a line break."""
    return msgspec.json.encode(report).decode()


def render(report: BenchReport) -> str:
    """Lay out a benchmark: the machine, latency and accuracy, then cold start and memory."""
    device = report.device
    versions = ", ".join(f"{name} {version}" for name, version in device.versions.items())
    threads = "engine's choice" if report.threads is None else str(report.threads)
    loads = " → ".join("unknown" if load is None else f"{load:.2f}" for load in (report.load_before, report.load_after))
    lines = [
        f"{device.cpu}, {device.cores} cores, {device.architecture}, governor {device.governor or 'unknown'}",
        f"{device.system}, Python {device.python}, {versions}",
        f"{report.measured_at}, load average {loads}, threads: {threads}, {report.iterations} predictions"
        f" in {report.rounds} rounds after {report.warmup} for warm-up each",
        "",
        table([_latency_row(artifact, report.workers) for artifact in report.artifacts]),
        "",
        table([_start_row(artifact) for artifact in report.artifacts]),
    ]
    if scored := [artifact for artifact in report.artifacts if artifact.evaluation is not None]:
        lines += ["", table([_accuracy_row(artifact) for artifact in scored])]
    for artifact in scored:
        if artifact.evaluation is not None and artifact.evaluation.skipped:
            lines.append(f"{artifact.name}: {len(artifact.evaluation.skipped)} unreadable images were left out")
    return "\n".join(lines)


def top1_text(scores: Scores) -> str:
    """Write top-1 accuracy with its 95 % interval, in percent."""
    return f"{scores.top1:.1%} [{scores.top1_low:.1%}, {scores.top1_high:.1%}]"


def megabytes(count: int | None) -> str:
    """Write a number of bytes in MB (10⁶)."""
    return "-" if count is None else f"{count / 1e6:.2f}"


def _latency_row(artifact: Measurement, workers: int) -> dict[str, str]:
    latency, stages = artifact.latency, artifact.stages
    row = {
        "model": artifact.name,
        "precision": artifact.precision,
        "runtime": artifact.runtime,
        "frame": f"{artifact.frame[1]}×{artifact.frame[0]}",
        "p50 ms": f"{latency.p50:.2f}",
        "p90": f"{latency.p90:.2f}",
        "p99": f"{latency.p99:.2f}",
        "mean": f"{latency.mean:.2f}",
        "spread": f"{latency.spread:.0%}",
        "preprocess": f"{stages.preprocess:.2f}",
        "infer": f"{stages.infer:.2f}",
        "decide": f"{stages.decide:.2f}",
        "images/s": f"{artifact.images_per_second:.1f}",
    }
    if artifact.concurrent_per_second is not None:
        row[f"images/s, {workers} threads"] = f"{artifact.concurrent_per_second:.1f}"
    return row


def _start_row(artifact: Measurement) -> dict[str, str]:
    start = artifact.cold_start
    return {
        "model": artifact.name,
        "size MB": megabytes(artifact.size_bytes),
        "peak RSS MB": megabytes(artifact.peak_rss_bytes),
        "import ms": f"{start.import_ms:.0f}",
        "load ms": f"{start.load_ms:.0f}",
        "first predict ms": f"{start.first_predict_ms:.1f}",
        "process to first prediction ms": f"{start.process_ms:.0f}",
    }


def _accuracy_row(artifact: Measurement) -> dict[str, str]:
    evaluation = artifact.evaluation
    assert evaluation is not None  # the caller kept those that have one
    scores = evaluation.scores
    return {
        "model": artifact.name,
        "split": evaluation.split,
        "images": str(scores.images),
        "top-1 [95 %]": top1_text(scores),
        "top-5": f"{scores.top5:.1%}",
        "balanced": f"{scores.balanced:.1%}",
        "macro F1": f"{scores.macro_f1:.3f}",
        "ECE": f"{scores.ece:.3f}",
        "AURC": f"{scores.aurc:.4f}",
    }
