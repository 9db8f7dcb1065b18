from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgefg.artifact.hashes import file_info
from edgefg.artifact.manifest import GoldenInfo, read_manifest
from edgefg.benchmarks import harness
from edgefg.benchmarks.measurement import BenchReport
from edgefg.benchmarks.report import json_line, render
from edgefg.benchmarks.worker import MeasuringJob, Ready, Round, RoundResult
from edgefg.errors import DataError
from edgefg.preprocess import UInt8Array
from tests.benchmarks.conftest import MakeArtifact

_TURN = Round(iterations=3, warmup=1, seconds=None, workers=1)


def _job(path: Path, **changes: Any) -> MeasuringJob:
    job = MeasuringJob(path=str(path), threads=None, device=None, frame="network", images=())
    return msgspec.structs.replace(job, **changes)


def test_two_artifacts_in_processes_of_their_own(
    null_artifact: MakeArtifact, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "edgefg")
    paths = [null_artifact("first", size=16), null_artifact("second", size=24, logits=(1.0, 0.0))]
    report = harness.bench(paths, data=data, iterations=7, warmup=1, rounds=3, frame="camera", workers=2)
    assert [artifact.name for artifact in report.artifacts] == ["first/model.null", "second/model.null"]
    for artifact in report.artifacts:
        latency, start = artifact.latency, artifact.cold_start
        assert latency.count == 7
        assert 0 < latency.minimum <= latency.p50 <= latency.p90 <= latency.p99 <= latency.maximum
        assert min(start.import_ms, start.load_ms, start.first_predict_ms) > 0
        assert start.process_ms > start.import_ms + start.load_ms + start.first_predict_ms
        assert artifact.frame == (720, 1280)
        assert artifact.stages.preprocess > 0
        assert artifact.images_per_second == pytest.approx(1000 / latency.mean)
        assert artifact.concurrent_per_second is not None
        assert artifact.concurrent_per_second > 0
        assert artifact.peak_rss_bytes is None or artifact.peak_rss_bytes > 5_000_000
        assert artifact.size_bytes == Path(artifact.path).stat().st_size
    evaluations = [artifact.evaluation for artifact in report.artifacts]
    assert [e.scores.top1 for e in evaluations if e] == pytest.approx([3 / 5, 2 / 5])
    assert f"cold start of {paths[0]}" in caplog.messages
    assert msgspec.json.decode(json_line(report), type=BenchReport) == report
    assert "60.0%" in render(report)


def test_processes_take_turns_there_and_back(null_artifact: MakeArtifact, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class FakeProcess:
        start_ms = 4.0
        ready = Ready(import_ms=1, load_ms=1, first_predict_ms=1, runtime="null 1", frame=(16, 16))

        def __init__(self, job: MeasuringJob) -> None:
            self.name = Path(job.path).parent.name

        def run(self, turn: Round) -> RoundResult:
            order.append(f"{self.name}{turn.iterations}")
            ones = [1.0] * turn.iterations
            return RoundResult(
                total=ones, preprocess=ones, infer=ones, decide=ones, concurrent_per_second=None, peak_rss=None
            )

        def __enter__(self) -> FakeProcess:
            return self

        def __exit__(self, *_: Any) -> None:
            order.append(f"{self.name} ends")

    monkeypatch.setattr(harness, "MeasuringProcess", FakeProcess)
    report = harness.bench([null_artifact("a"), null_artifact("b")], iterations=8, rounds=3)
    assert order == ["a3", "b3", "b3", "a3", "a2", "b2", "b ends", "a ends"]
    assert [artifact.latency.count for artifact in report.artifacts] == [8, 8]
    assert report.artifacts[0].evaluation is None


def test_artifacts_of_one_name_are_told_apart(null_artifact: MakeArtifact, tmp_path: Path) -> None:
    first = null_artifact("null")
    second = tmp_path / "other" / "null"
    shutil.copytree(first.parent, second)
    paths = [first, second / first.name]
    report = harness.bench(paths, iterations=1, warmup=0)
    assert [artifact.name for artifact in report.artifacts] == [str(path) for path in paths]


def test_the_golden_set_is_not_part_of_the_model(null_artifact: MakeArtifact) -> None:
    model = null_artifact()
    manifest = read_manifest(model)
    golden = model.with_name("golden.npz")
    golden.write_bytes(b"x" * 1000)
    with_golden = msgspec.structs.replace(
        manifest,
        files=(*manifest.files, file_info(golden)),
        golden=GoldenInfo(file=golden.name, frames=1, logits=1.0, parent_logits=1.0),
    )
    assert harness.model_bytes(with_golden) == harness.model_bytes(manifest) == model.stat().st_size


@pytest.mark.parametrize(
    "options", [{"iterations": 0}, {"rounds": 0}, {"workers": 0}, {"warmup": -1}, {"seconds": 0}, {"frame": "large"}]
)
def test_options_out_of_range(null_artifact: MakeArtifact, options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"must be|choose"):
        harness.bench([null_artifact()], **options)  # type: ignore[arg-type]


def test_no_artifact() -> None:
    with pytest.raises(ValueError, match="no artifact"):
        harness.bench([])


def test_data_that_do_not_fit_are_found_before_anything_is_measured(
    null_artifact: MakeArtifact, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(harness, "MeasuringProcess")
    with pytest.raises(DataError, match="not among the artifact's"):
        harness.bench([null_artifact("fits"), null_artifact("other", labels=("apple", "plum"))], data=data)


def test_a_corrupt_photograph(null_artifact: MakeArtifact, data: Path) -> None:
    (data / "test" / "apple" / "0.png").write_bytes(b"no image")
    model = null_artifact()
    with pytest.raises(DataError, match=r"0\.png"):
        harness.bench([model], data=data, iterations=1)
    evaluation = harness.bench([model], data=data, iterations=1, skip_corrupt=True).artifacts[0].evaluation
    assert evaluation is not None
    assert evaluation.scores.images == 4


def _frame() -> UInt8Array:
    import numpy as np

    return np.zeros((16, 16, 3), np.uint8)
