"""The keys of a report, which programs read."""

from __future__ import annotations

import msgspec

from edgefg.benchmarks.harness import bench
from edgefg.benchmarks.measurement import BenchReport
from tests.benchmarks.conftest import MakeArtifact


def test_the_json_of_a_report(null_artifact: MakeArtifact) -> None:
    report = bench([null_artifact()], iterations=2, rounds=2, warmup=0)
    found = msgspec.to_builtins(report)
    assert list(found) == [
        "measured_at", "device", "load_before", "load_after", "iterations", "warmup", "rounds", "threads",
        "engine_device", "workers", "frame", "artifacts",
    ]  # fmt: skip
    assert list(found["artifacts"][0]) == [
        "name", "path", "precision", "runtime", "input", "frame", "size_bytes", "latency", "stages",
        "images_per_second", "concurrent_per_second", "cold_start", "peak_rss_bytes", "evaluation",
    ]  # fmt: skip
    assert set(found["artifacts"][0]["cold_start"]) == {"import_ms", "load_ms", "first_predict_ms", "process_ms"}
    assert msgspec.convert(found, BenchReport) == report
