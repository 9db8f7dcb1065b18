"""The worker in this process: its messages, and plans that are whole or absent."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from edgefg.export.tensorrt.worker import (
    BuildConfig,
    BuildDevice,
    BuildJob,
    BuildStep,
    Message,
    Outcome,
    build,
    describe,
)
from tests.conftest import TINY
from tests.simulated.install import simulated_device


def job(target: Path, **changes: object) -> BuildJob:
    onnx = str(TINY / "onnx" / "model.onnx")
    plain = BuildJob(onnx=onnx, target=str(target), precision="fp32", settings=BuildConfig(), workspace=64)
    return msgspec.structs.replace(plain, **changes)


def test_a_plan_and_its_steps(tmp_path: Path) -> None:
    sent: list[Message] = []
    with simulated_device() as books:
        assert build(job(tmp_path / "engine.plan"), sent.append) == Outcome(True)
        books.assert_clean()
    assert (tmp_path / "engine.plan").stat().st_size > 0
    steps = [message for message in sent if isinstance(message, BuildStep)]
    assert steps
    assert steps[-1].done == steps[-1].steps


@pytest.mark.parametrize(
    ("config", "said"),
    [({"parser_error": "No importer"}, "cannot read the network"), ({"build_error": "Error Code 10"}, "Error Code 10")],
)
def test_a_failure_is_an_outcome_and_leaves_nothing(config: dict[str, object], said: str, tmp_path: Path) -> None:
    with simulated_device(**config):
        outcome = build(job(tmp_path / "engine.plan"), lambda _: None)
    assert (outcome.built, said in outcome.error, outcome.out_of_memory) == (False, True, False)
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_is_told_apart(tmp_path: Path) -> None:
    with simulated_device(build_fails_above=1 << 20):
        assert build(job(tmp_path / "engine.plan"), lambda _: None).out_of_memory


def test_timings_are_written_where_the_job_says(tmp_path: Path) -> None:
    with simulated_device():
        build(job(tmp_path / "engine.plan", timing_cache=str(tmp_path / "a.timing")), lambda _: None)
    assert (tmp_path / "a.timing").stat().st_size > 0


def test_messages_survive_json() -> None:
    with simulated_device():
        device = describe()
    assert isinstance(device, BuildDevice)
    for message in (device, BuildStep("build", 1, 2), Outcome(False, "why", True)):
        assert msgspec.json.decode(msgspec.json.encode(message), type=Message) == message
