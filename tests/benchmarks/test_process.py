"""The measuring process: its answers, its errors, its end."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from edgefg import IntegrityError, RuntimeUnavailableError
from edgefg.benchmarks import process
from edgefg.benchmarks.process import MeasuringProcess
from edgefg.benchmarks.worker import BOOTSTRAP, MeasuringJob, Round
from tests.benchmarks.conftest import MakeArtifact

_TURN = Round(iterations=3, warmup=1, seconds=None, workers=1)


def _job(path: Path, **changes: object) -> MeasuringJob:
    job = MeasuringJob(path=str(path), threads=None, device=None, frame="network", images=())
    return msgspec.structs.replace(job, **changes)


def test_photographs_are_brought_to_the_frames_size(null_artifact: MakeArtifact, data: Path) -> None:
    job = _job(null_artifact(), images=tuple(map(str, (data / "test").rglob("*.png"))))
    with MeasuringProcess(job) as running:
        assert running.ready.frame == (16, 16)
        assert len(running.run(_TURN).total) == 3


def test_an_artifact_that_cannot_be_used_raises_its_own_error(null_artifact: MakeArtifact) -> None:
    model = null_artifact()
    model.write_bytes(b"{}")
    with pytest.raises(IntegrityError, match="has 2 bytes"):
        MeasuringProcess(_job(model))


def test_a_process_that_dies_is_said(null_artifact: MakeArtifact, monkeypatch: pytest.MonkeyPatch) -> None:
    model = null_artifact()
    monkeypatch.setattr(process, "BOOTSTRAP", "import os; os._exit(3)")
    with pytest.raises(RuntimeUnavailableError, match=r"model\.null ended with status 3"):
        MeasuringProcess(_job(model))


def test_a_process_that_dies_between_rounds_is_said(null_artifact: MakeArtifact) -> None:
    with MeasuringProcess(_job(null_artifact())) as running:
        running.run(_TURN)
        running._process.kill()
        running._process.wait()
        with pytest.raises(RuntimeUnavailableError, match="ended with status -9"):
            running.run(_TURN)


def test_what_an_engine_prints_does_not_disturb(null_artifact: MakeArtifact, monkeypatch: pytest.MonkeyPatch) -> None:
    chatty = """
import os
from edgefg.runtimes.null import NullRuntime
infer = NullRuntime.infer
NullRuntime.infer = lambda self, batch: (os.write(1, b"Reticulating splines\\n"), infer(self, batch))[1]
main(seconds)
"""
    monkeypatch.setattr(process, "BOOTSTRAP", BOOTSTRAP.replace("main(seconds)", chatty))
    with MeasuringProcess(_job(null_artifact())) as running:
        assert len(running.run(_TURN).total) == 3
