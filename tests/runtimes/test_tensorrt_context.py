"""Contexts of the TensorRT runtime on the simulated device: graphs and memory."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from edgefg import Classifier
from edgefg.runtime import load
from tests.conftest import TINY
from tests.runtimes.test_tensorrt import frames, write_bare
from tests.simulated.books import Fault
from tests.simulated.install import simulated_device


def test_the_first_run_is_plain_then_a_graph(plan: Path) -> None:
    with simulated_device() as books, Classifier(plan) as classifier:
        logits = []
        for runs, launches in ((1, 0), (2, 1), (2, 2), (2, 3)):  # execute_async_v3: once plain, once to be captured
            logits.append(classifier.predict(frames(1)[0]).logits)
            assert (books.calls["execute_async_v3"], books.calls["cudaGraphLaunch"]) == (runs, launches)
    assert all(np.array_equal(logits[0], other) for other in logits)


@pytest.mark.parametrize(
    ("call", "at"),
    [
        *(("cudaStreamBeginCapture", 1), ("cudaStreamEndCapture", 1), ("cudaGraphInstantiate", 1)),
        *(
            ("cudaMemcpyAsync", 3),
            ("cudaMemcpyAsync", 4),
            ("execute_async_v3", 2),
        ),  # first plainly, then in the capture
    ],
)
def test_where_no_graph_can_be_captured_it_runs_without(
    call: str, at: int, plan: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with simulated_device() as books, caplog.at_level(logging.WARNING):
        books.faults.append(Fault(call, at=at, error=900))
        with Classifier(plan) as classifier:
            logits = [classifier.predict(frames(1)[0]).logits for _ in range(4)]
        books.assert_clean()
    assert all(np.array_equal(logits[0], other) for other in logits)
    assert books.calls["cudaGraphLaunch"] == 0
    assert caplog.text.count("no CUDA graph (") == 1
    assert "CaptureUnsupported" in caplog.text or call == "execute_async_v3"


def test_a_batch_that_is_not_repeated_gets_no_graph(tmp_path: Path) -> None:
    path = write_bare(tmp_path / "engine.plan", TINY / "onnx-dynamic" / "model.onnx", [(1, 4, 8)])
    batch = np.stack([frame[:64, :64] for frame in frames(20)[14:]])
    with simulated_device() as books:
        runtime = load(path)
        expected = {size: runtime.infer(batch[:size]) for size in (1, 2, 3)}
        for size in (3, 1, 2, 2, 2, 1):
            np.testing.assert_array_equal(runtime.infer(batch[:size]), expected[size])
        runtime.close()
        assert books.calls["cudaGraphLaunch"] == 3  # 3 3, and two of 2 2 2
        books.assert_clean()


def test_memory_is_allocated_once(plan: Path) -> None:
    with simulated_device() as books, Classifier(plan) as classifier:
        classifier.predict(frames(1)[0])
        before = (books.calls["cudaMalloc"], books.calls["cudaHostAlloc"], books.calls["create_execution_context"])
        for frame in frames(20):
            classifier.predict(frame)
        after = (books.calls["cudaMalloc"], books.calls["cudaHostAlloc"], books.calls["create_execution_context"])
        assert before == after == (2, 2, 1)
