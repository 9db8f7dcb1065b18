"""The TensorRT runtime on the simulated device: real predictions, and every failure a typed error without a leak."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgefg import Classifier
from edgefg.errors import InferenceError
from edgefg.image_io import image_files, read_image
from edgefg.preprocess import UInt8Array
from edgefg.runtime import load
from tests.conftest import TINY
from tests.simulated.books import Fault
from tests.simulated.install import ROOT, SITE, simulated_device
from tests.simulated.tensorrt_engine import VERSIONS, Plan, write_plan
from tests.threads import run_together

Rewrite = Callable[..., object]
BINDINGS = pytest.mark.parametrize("pycuda", [False, True], ids=["cuda-python", "pycuda"])


def write_bare(path: Path, model: Path, profiles: list[tuple[int, int, int]] | None = None) -> Path:
    plan = Plan(gpu="Simulated Orin", compute_capability=(8, 7), profiles=profiles or [])
    path.write_bytes(write_plan(plan, model.read_bytes(), VERSIONS[10]))
    return path


def frames(count: int) -> list[UInt8Array]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (50 + i, 80, 3), np.uint8) for i in range(count)]


@BINDINGS
@pytest.mark.parametrize("major", [10, 11])
def test_64_photographs_through_the_plumbing(
    qdq: Path, grocery: Path, pycuda: bool, major: int, tmp_path: Path
) -> None:
    """A test of the plumbing: the simulated device computes with ONNX Runtime, so logits are equal bit for bit."""
    from edgefg.export.tensorrt.build import build_engine

    photographs = [read_image(path) for path in list(image_files(grocery / "val"))[::4][:64]]
    assert len(photographs) == 64
    with Classifier(qdq, threads=1) as parent:
        expected = [parent.predict(frame) for frame in photographs]
    with simulated_device(pycuda=pycuda, major=major) as books:
        path = build_engine([qdq], out=tmp_path / "plan").plan
        with Classifier(path, verify=True) as classifier:
            found = [classifier.predict(frame) for frame in photographs]
            assert classifier.runtime_version == f"tensorrt {'.'.join(map(str, VERSIONS[major]))}"
        books.assert_clean()
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.logits, other.logits)
        assert one.label == other.label
    assert (books.calls["cudaGraphLaunch"] > 64 - 2) is not pycuda


def predict_together(classifier: Classifier, each: int) -> None:
    """On 8 threads at once, as many predictions on each must be those of one thread alone."""
    given = frames(10)
    expected = [classifier.predict(frame).logits for frame in given]

    def work(first: int) -> None:
        for i in range(first, first + each):
            np.testing.assert_array_equal(classifier.predict(given[i % 10]).logits, expected[i % 10])

    run_together(work)


@pytest.mark.slow
@BINDINGS
def test_8_threads_of_1000_predictions(plan: Path, pycuda: bool) -> None:
    with simulated_device(pycuda=pycuda) as books:
        with Classifier(plan) as classifier:
            predict_together(classifier, 1000)
        assert books.peak["contexts"] <= 8
        books.assert_clean()


@BINDINGS
def test_threads_share_four_contexts_while_captures_and_allocations_take_long(plan: Path, pycuda: bool) -> None:
    with simulated_device(pycuda=pycuda, jitter=0.002) as books:
        with Classifier(plan) as classifier:
            predict_together(classifier, 20)
        assert 1 < books.peak["contexts"] <= 4
        books.assert_clean()


@BINDINGS
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_runtime_that_nobody_closed_frees_all(plan: Path, pycuda: bool, elsewhere: bool) -> None:
    with simulated_device(pycuda=pycuda) as books:
        opened = [Classifier(plan)]
        opened[0].predict(frames(1)[0])
        if elsewhere:
            thread = threading.Thread(target=opened.clear)
            thread.start()
            thread.join()
        else:
            opened.clear()
        books.assert_clean()


def test_profiles(tmp_path: Path) -> None:
    path = write_bare(tmp_path / "engine.plan", TINY / "onnx-dynamic" / "model.onnx", [(4, 6, 8), (1, 1, 2)])
    batch = np.random.default_rng(1).integers(0, 256, (19, 64, 64, 3), np.uint8)
    with simulated_device() as books:
        runtime = load(path)
        assert runtime.input.shape == (None, 64, 64, 3)
        whole = runtime.infer(batch)  # 8, 8 and 3, which the larger profile takes filled up to 4
        assert whole.shape == (19, 4)
        for size in (1, 2, 3, 8):
            np.testing.assert_allclose(runtime.infer(batch[:size]), whole[:size], atol=1e-5)
        runtime.close()
        books.assert_clean()


CALLS = [
    ("cudaMemcpyAsync", 1), ("cudaMemcpyAsync", 2), ("cudaStreamSynchronize", 1),
    ("cudaStreamSynchronize", 2), ("cudaMalloc", 1), ("cudaMalloc", 2), ("cudaHostAlloc", 1), ("cudaHostAlloc", 2),
    ("cudaStreamCreateWithFlags", 1), ("create_execution_context", 1), ("execute_async_v3", 1), ("cudaGraphLaunch", 1),
    ("cudaSetDevice", 3),
]  # fmt: skip


@pytest.mark.parametrize(("call", "at"), CALLS)
def test_a_failing_call_is_an_inference_error_and_passes(call: str, at: int, plan: Path) -> None:
    with simulated_device() as books:
        with Classifier(plan) as classifier:
            books.faults.append(Fault(call, at=at, error=2))
            books.calls.clear()
            outcomes = []
            for _ in range(4):
                try:
                    outcomes.append(classifier.predict(frames(1)[0]).label)
                except InferenceError as exc:
                    outcomes.append(str(exc))
        (failure,) = [outcome for outcome in outcomes if outcome not in classifier.labels]
        assert "engine.plan" in failure
        assert "\n" not in failure
        assert not books.faults
        books.assert_clean()


@pytest.mark.parametrize("call", ["cudaMemcpyAsync", "cudaStreamSynchronize", "cudaGraphLaunch", "execute_async_v3"])
def test_an_error_that_sticks_ends_in_the_same_error_and_frees_all(call: str, plan: Path) -> None:
    with simulated_device() as books:
        with Classifier(plan) as classifier:
            classifier.predict(frames(1)[0])
            books.faults.append(Fault(call, at=1, error=700, sticky=True))
            if call == "execute_async_v3":
                books.faults.insert(0, Fault("cudaStreamBeginCapture", at=1, error=900))
            for _ in range(3):
                with pytest.raises(InferenceError, match=r"IllegalAddress|illegal memory access"):
                    classifier.predict(frames(1)[0])
        assert {kind: count for kind, count in books.left().items() if kind != "streams"} == {}


def test_calls_that_wait_for_a_context_do_not_wait_for_ever_after_a_failure(plan: Path) -> None:
    with simulated_device(jitter=0.002) as books:
        books.faults.append(Fault("cudaStreamSynchronize", at=9, error=700, sticky=True))
        classifier = Classifier(plan)

        def predict_100_times() -> None:
            for _ in range(100):
                classifier.predict(frames(1)[0])

        def work(_: int) -> None:
            with pytest.raises(InferenceError):
                predict_100_times()

        run_together(work, 12)
        classifier.close()
        assert {kind: count for kind, count in books.left().items() if kind != "streams"} == {}


def test_a_predict_after_close_is_told(plan: Path) -> None:
    with simulated_device() as books:
        runtime = load(plan)
        runtime.close()
        with pytest.raises(RuntimeError, match="closed"):
            runtime.infer(np.zeros((1, 64, 64, 3), np.uint8))
        books.assert_clean()


def test_closing_while_threads_predict(plan: Path) -> None:
    with simulated_device() as books:
        classifier = Classifier(plan)
        running = threading.Barrier(5)
        stopped: list[str] = []

        def work() -> None:
            running.wait()
            try:
                while True:
                    classifier.predict(frames(1)[0])
            except RuntimeError as exc:
                stopped.append(str(exc))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        running.wait()
        classifier.close()
        for thread in threads:
            thread.join()
        assert len(stopped) == 4
        assert all("closed" in text for text in stopped)
        books.assert_clean()


def test_no_torch(plan: Path, python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    code = f"""
sys.path[:0] = [{str(SITE)!r}, {str(ROOT)!r}]
import edgefg, numpy
with edgefg.Classifier(sys.argv[1], verify=True) as classifier:
    print(classifier.predict(numpy.zeros((64, 64, 3), numpy.uint8)).label)
assert "torch" not in sys.modules and "edgefg.export" not in sys.modules
"""
    result = python(code, plan, blocked=("torch", "torchvision", "timm", "nncf", "openvino", "cyclopts", "safetensors"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() in ("bar", "cross", "disc", "pair")
