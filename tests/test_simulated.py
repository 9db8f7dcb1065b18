"""The simulated device itself: right use leaves clean books, and each wrong use is caught."""

from __future__ import annotations

import importlib
import threading
import time

import numpy as np
import pytest

from tests.simulated.books import Books, Fault, expect_violation
from tests.simulated.conftest import books, rig
from tests.simulated.install import simulated_device
from tests.simulated.rig import DYNAMIC, IN, LOCAL, OUT, STATIC, Rig, expected, images, in_thread, make_plan, ok
from tests.simulated.wrong_uses import WRONG

__all__ = ["books", "rig"]


@pytest.mark.parametrize("major", [10, 11])
def test_right_use(major: int) -> None:
    with simulated_device(major=major) as books:
        rig = Rig(books, make_plan(major=major))
        for image in images(3):
            np.testing.assert_array_equal(rig.infer(image), expected(STATIC, image[np.newaxis])[0])
        rig.capture()
        for image in images(3):
            np.testing.assert_array_equal(rig.infer(image), expected(STATIC, image[np.newaxis])[0])
        assert rig.books.peak["contexts"] == 1
        assert rig.books.bytes["device"] == IN + OUT == rig.books.bytes["pinned"]
        with pytest.raises(AssertionError, match=r"leak: 1 graphs|leak: 2 device memory"):
            books.assert_clean()
        rig.close()
        books.assert_clean()
        assert not books.warnings


def test_nothing_is_done_before_somebody_waits(rig: Rig) -> None:
    (image,) = images()
    rig.host(0)[:] = image.ravel()
    rig.enqueue()
    assert (rig.host(1) == 0xCD).all()
    assert rig.rt.cudaStreamQuery(rig.stream)[0] == 600
    rig.wait()
    np.testing.assert_array_equal(rig.host(1).view(np.float32), expected(STATIC, image[np.newaxis])[0])


def test_profiles_and_shapes(books: Books) -> None:
    rig = Rig(books, make_plan(DYNAMIC, profiles=[(1, 1, 1), (2, 4, 8)]), ready=False)
    context, (image, logits) = rig.context, [rig.engine.get_tensor_name(i) for i in range(2)]
    assert tuple(rig.engine.get_tensor_shape(image)) == (-1, 64, 64, 3)
    assert [shape[0] for shape in rig.engine.get_tensor_profile_shape(image, 1)] == [2, 4, 8]
    assert context.infer_shapes() == [image]
    assert not context.set_input_shape(image, (3, 64, 64, 3))
    assert "[simulated] Error Code 3" in rig.said[-1]
    assert context.set_optimization_profile_async(1, rig.stream)
    rig.wait()
    assert context.set_input_shape(image, (3, 64, 64, 3))
    assert context.infer_shapes() == []
    assert context.get_tensor_shape(logits) == (3, 4)
    assert not books.violations


@pytest.mark.parametrize("words", WRONG)
def test_wrong_use_is_caught(words: str, rig: Rig) -> None:
    with expect_violation(rig.books, words):
        WRONG[words](rig)


def test_another_threads_capture_is_its_own_where_it_is_thread_local(rig: Rig) -> None:
    rig.infer(images()[0])
    ok(rig.rt.cudaStreamBeginCapture(rig.stream, rig.rt.cudaStreamCaptureMode(LOCAL)))
    in_thread(lambda: (rig.rt.cudaSetDevice(0), ok(rig.rt.cudaFree(ok(rig.rt.cudaMalloc(8))))))
    rig.enqueue()
    ok(rig.rt.cudaStreamEndCapture(rig.stream))
    assert not rig.books.violations


def test_the_default_stream_warns(rig: Rig) -> None:
    assert rig.context.execute_async_v3(0)
    assert "Using default stream" in rig.books.warnings[0]
    assert "Using default stream" in rig.said[-1]
    ok(rig.rt.cudaDeviceSynchronize())
    assert not rig.books.violations


def test_a_stream_of_another_device() -> None:
    with simulated_device(devices=2) as books:
        rig = Rig(books, make_plan())
        ok(rig.rt.cudaSetDevice(1))
        with expect_violation(books, "execute_async_v3 on a stream of device 0; the thread's is 1"):
            assert not rig.context.execute_async_v3(rig.stream)


def test_a_profile_that_may_not_be_there_yet(books: Books) -> None:
    rig = Rig(books, make_plan(DYNAMIC, profiles=[(1, 1, 1)]))
    other = ok(rig.rt.cudaStreamCreateWithFlags(1))
    assert rig.context.set_optimization_profile_async(0, other)
    with expect_violation(books, "no shape is set for"):
        assert not rig.context.execute_async_v3(other)
    rig.context.set_input_shape(rig.engine[0], (1, 64, 64, 3))
    rig.context.set_optimization_profile_async(0, other)
    with expect_violation(books, "the stream of set_optimization_profile_async was not synchronized"):
        assert not rig.context.execute_async_v3(rig.stream)


# Deserialisation


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "magicTag"),
        (b"garbage" * 20, "magicTag"),
        (make_plan()[:-1], "corrupt"),
        (make_plan()[:100], "corrupt"),
        (make_plan(major=11), "expecting library version 11.4.0.106 got 10.16.1.11"),
        (make_plan(compute_capability=(7, 2)), "incompatible device"),
    ],
)
def test_plans_that_do_not_fit(data: bytes, said: str, books: Books) -> None:
    rig = Rig(books, data)
    assert rig.engine is None
    assert said in rig.said[-1]
    assert rig.said[-1].startswith("[simulated] ")
    rig.close()
    books.assert_clean()


def test_a_plan_of_another_model_of_the_same_kind_warns(books: Books) -> None:
    rig = Rig(books, make_plan(gpu="Simulated Orin NX"))
    assert "different models of devices" in books.warnings[0]
    rig.close()
    books.assert_clean()


def test_a_stripped_plan_makes_no_context(books: Books) -> None:
    assert Rig(books, make_plan(stripped=True), ready=False).context is None


# Faults


@pytest.mark.parametrize(
    ("call", "at", "error"), [("cudaMalloc", 2, 2), ("cudaHostAlloc", 1, 2), ("cudaStreamCreateWithFlags", 1, 999)]
)
def test_the_nth_call_fails(call: str, at: int, error: int) -> None:
    with simulated_device(faults=[Fault(call, at=at, error=error)]) as books:
        rt = importlib.import_module("cuda.bindings.runtime")
        ok(rt.cudaSetDevice(0))
        arguments = {"cudaMalloc": (8,), "cudaHostAlloc": (8, 0)}.get(call, (1,))
        results = [getattr(rt, call)(*arguments) for _ in range(3)]
        assert [int(result[0]) for result in results] == [error if i == at - 1 else 0 for i in range(3)]
        assert results[at - 1][1] is None
        assert (rt.cudaGetLastError(), rt.cudaGetLastError()) == ((error,), (0,))
        assert not books.violations


def test_more_memory_than_there_is() -> None:
    with simulated_device(free=1 << 20):
        rt = importlib.import_module("cuda.bindings.runtime")
        ok(rt.cudaSetDevice(0))
        half = ok(rt.cudaMalloc(600_000))
        assert rt.cudaMalloc(600_000) == (rt.cudaError_t(2), None)
        assert rt.cudaMemGetInfo()[1:] == ((1 << 20) - 600_000, 8 << 30)
        ok(rt.cudaFree(half))
        ok(rt.cudaMalloc(600_000))


@pytest.mark.parametrize("sticky", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_a_failed_execution(late: bool, sticky: bool, rig: Rig) -> None:
    rig.infer(images()[0])
    rig.books.faults.append(Fault("execute_async_v3", error=700, late=late, sticky=sticky))
    assert rig.context.execute_async_v3(rig.stream) is late
    assert int(rig.rt.cudaStreamSynchronize(rig.stream)[0]) == (700 if late or sticky else 0)
    assert int(rig.rt.cudaMalloc(8)[0]) == (700 if sticky else 0)
    assert int(rig.rt.cudaGetLastError()[0]) == (700 if late or sticky else 0)
    if sticky:
        for address in rig.device:
            rig.rt.cudaFree(address)
        assert "device memory" not in rig.books.left()
    assert not rig.books.violations


@pytest.mark.parametrize("call", ["cudaStreamEndCapture", "cudaGraphInstantiate", "cudaMemcpyAsync"])
def test_a_capture_that_fails(call: str, rig: Rig) -> None:
    rig.infer(images()[0])
    rig.books.faults.append(Fault(call, error=900))
    with pytest.raises(AssertionError):
        rig.capture()
    rig.rt.cudaStreamEndCapture(rig.stream)
    assert int(rig.rt.cudaStreamIsCapturing(rig.stream)[1]) == 0


@pytest.mark.parametrize("error", [35, 100])
def test_no_driver(error: int) -> None:
    with simulated_device(driver_error=error):
        rt = importlib.import_module("cuda.bindings.runtime")
        assert rt.cudaGetDeviceCount() == (error, None)
        assert rt.cudaDriverGetVersion() == (0, 0 if error == 35 else 13000)


def test_a_slow_plan_and_a_wrong_one(books: Books) -> None:
    rig = Rig(books, make_plan(slow=0.05, wrong=3.0))
    start = time.perf_counter()
    found = rig.infer(images()[0])
    assert time.perf_counter() - start > 0.05
    np.testing.assert_allclose(found, expected(STATIC, images())[0] + 3, rtol=1e-5)


def test_jitter_lets_another_thread_come_between() -> None:
    with simulated_device(jitter=0.2) as books:
        rig = Rig(books, make_plan())
        rig.infer(images()[0])
        mode = rig.rt.cudaStreamCaptureMode.cudaStreamCaptureModeGlobal
        capturing = threading.Thread(target=lambda: rig.rt.cudaStreamBeginCapture(rig.stream, mode))
        capturing.start()
        while not books.calls["cudaStreamBeginCapture"]:
            time.sleep(0.001)
        time.sleep(0.05)
        with expect_violation(books, "cudaMalloc while another thread captures"):
            assert int(rig.rt.cudaMalloc(8)[0]) == 900
        capturing.join()
