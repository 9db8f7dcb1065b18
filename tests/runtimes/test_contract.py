"""The one contract that every runtime keeps (edgefg.runtime.Runtime)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from edgefg.errors import InferenceError, RuntimeUnavailableError
from edgefg.preprocess import InputSpec, UInt8Array, prepare
from edgefg.runtime import RUNTIMES, Runtime, engines, load, runtime_for
from tests.conftest import MODELS, ROOT, TINY
from tests.simulated.install import simulated_device
from tests.simulated.tensorrt_engine import VERSIONS, Plan, write_plan
from tests.threads import run_together

SPEC = InputSpec(height=64, width=64)
PLANS = {"plan": "onnx", "plan-batch4": "onnx-batch4", "plan-dynamic": "onnx-dynamic"}
"""TensorRT plans, on the simulated device, by the tiny model that they are built of."""
BATCH = {name: 4 if "batch4" in name else None if "dynamic" in name else 1 for name in (*MODELS, *PLANS)}
SUFFIXES = sorted(RUNTIMES)


@pytest.fixture(params=[*MODELS, *PLANS])
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def model(name: str, tmp_path: Path) -> Iterator[Path]:
    """The model file; a plan with the simulated device that it runs on."""
    if name in MODELS:
        yield TINY / MODELS[name]
        return
    with simulated_device() as books:
        path = tmp_path / "engine.plan"
        onnx = (TINY / MODELS[PLANS[name]]).read_bytes()
        profiles = [(1, 4, 16)] if BATCH[name] is None else []
        plan = Plan(gpu="Simulated Orin", compute_capability=(8, 7), profiles=profiles)
        path.write_bytes(write_plan(plan, onnx, VERSIONS[10]))
        yield path
        books.assert_clean()


@pytest.fixture
def runtime(model: Path) -> Iterator[Runtime]:
    loaded = load(model, threads=1)
    yield loaded
    loaded.close()


@pytest.fixture
def batch(name: str, birds: tuple[tuple[str, ...], list[UInt8Array]]) -> UInt8Array:
    return np.stack([prepare(frame, SPEC) for frame in birds[1][: BATCH[name] or 3]])


def test_every_runtime_is_under_contract() -> None:
    assert {*(Path(model).suffix for model in MODELS.values()), ".plan", ".engine"} == set(RUNTIMES)
    assert RUNTIMES[".plan"] == RUNTIMES[".engine"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_a_runtime_states_of_itself(suffix: str) -> None:
    stated = runtime_for(Path(f"model{suffix}"))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert not stated.extra or f"\n{stated.extra} = [" in project
    assert all(companion.startswith(".") and companion not in RUNTIMES for companion in stated.companions)
    assert not stated.int8_remedy.endswith(".")  # it ends a message


def test_input(name: str, runtime: Runtime) -> None:
    assert runtime.input.shape == (BATCH[name], 64, 64, 3)
    assert runtime.input.dtype == "uint8"


def test_version_is_name_and_number(runtime: Runtime) -> None:
    engine, number = runtime.version.split()
    assert engine in ("null", *engines())
    assert number[0].isdigit()


def test_logits(runtime: Runtime, batch: UInt8Array) -> None:
    logits = runtime.infer(batch)
    assert type(logits) is np.ndarray
    assert logits.dtype == np.float32
    assert logits.shape == (len(batch), 4)
    assert np.isfinite(logits).all()
    np.testing.assert_array_equal(runtime.infer(batch), logits)


def test_logits_depend_on_the_frame(name: str, runtime: Runtime, batch: UInt8Array) -> None:
    other = runtime.infer(255 - batch)
    assert np.array_equal(other, runtime.infer(batch)) is (name == "null")


def test_logits_are_the_callers_own(runtime: Runtime, batch: UInt8Array) -> None:
    first = runtime.infer(batch)
    kept = first.copy()
    first[:] = np.nan
    second = runtime.infer(batch)
    np.testing.assert_array_equal(second, kept)
    runtime.infer(255 - batch)
    np.testing.assert_array_equal(second, kept)
    runtime.close()
    np.testing.assert_array_equal(second, kept)


def test_batch_is_neither_kept_nor_changed(runtime: Runtime, batch: UInt8Array) -> None:
    expected = runtime.infer(batch.copy())
    before = batch.copy()
    found = runtime.infer(batch)
    np.testing.assert_array_equal(batch, before)
    batch[:] = 0
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(runtime.infer(before), expected)


@pytest.mark.parametrize("layout", ["reversed", "strided", "fortran", "read-only", "list-of-planes"])
def test_any_memory_layout(layout: str, runtime: Runtime, batch: UInt8Array) -> None:
    expected = runtime.infer(batch)
    given = {
        "reversed": np.ascontiguousarray(batch[..., ::-1])[..., ::-1],
        "strided": np.repeat(batch, 2, axis=2)[:, :, ::2],
        "fortran": np.asfortranarray(batch),
        "read-only": batch.copy(),
        "list-of-planes": np.ascontiguousarray(batch.transpose(3, 0, 1, 2)).transpose(1, 2, 3, 0),
    }[layout]
    np.testing.assert_array_equal(given, batch)
    given.flags.writeable = layout != "read-only"
    np.testing.assert_array_equal(runtime.infer(given), expected)


@pytest.mark.parametrize("name", [name for name in [*MODELS, *PLANS] if name != "null"])
def test_a_batch_that_does_not_fit_is_no_silent_success(runtime: Runtime, batch: UInt8Array) -> None:
    with pytest.raises((InferenceError, ValueError)):
        runtime.infer(batch[:, :32])
    assert np.isfinite(runtime.infer(batch)).all()


def test_close_is_idempotent(runtime: Runtime, batch: UInt8Array) -> None:
    runtime.infer(batch)
    runtime.close()
    runtime.close()


def test_close_without_use(runtime: Runtime) -> None:
    runtime.close()


def test_two_runtimes_on_one_file(model: Path, batch: UInt8Array) -> None:
    first, second = (load(model, threads=1) for _ in range(2))
    expected = first.infer(batch)
    first.close()
    np.testing.assert_array_equal(second.infer(batch), expected)
    second.close()


def test_threads_share_a_runtime(runtime: Runtime, batch: UInt8Array) -> None:
    batches = [np.roll(batch, shift, axis=2) for shift in range(0, 40, 8)]
    expected = [runtime.infer(one) for one in batches]

    def work(first: int) -> None:
        for i in range(first, first + 30):
            np.testing.assert_array_equal(runtime.infer(batches[i % 5]), expected[i % 5])

    run_together(work)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("content", [b"", b"garbage", b"\xff\xfe\x00" * 30, b"{}", b"<net></net>", None])
def test_wrong_content_is_refused_in_one_line(suffix: str, content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RuntimeUnavailableError, match=f"model{suffix}") as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None


def test_ir_without_its_weights(tmp_path: Path) -> None:
    path = tmp_path / "model.xml"
    path.write_bytes((TINY / MODELS["ir"]).read_bytes())
    with pytest.raises(RuntimeUnavailableError, match=r"refused .*model\.xml"):
        load(path)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("device", ["CPU", "cpu"])
def test_the_cpu_by_name(name: str, device: str, batch: UInt8Array) -> None:
    runtime = load(TINY / MODELS[name], threads=1, device=device)
    assert runtime.infer(batch).shape == (len(batch), 4)
    runtime.close()


@pytest.mark.parametrize("name", ["onnx", "ir"])
def test_an_unknown_device_is_named(name: str) -> None:
    with pytest.raises(RuntimeUnavailableError, match="ABACUS"):
        load(TINY / MODELS[name], device="ABACUS")


@pytest.mark.parametrize("cache", ["", "missing/deeper", "a-file/below"])
def test_openvino_works_whatever_the_cache_directory(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a-file").touch()
    monkeypatch.setenv("EDGEFG_CACHE", str(tmp_path / cache) if cache else "")
    runtime = load(TINY / MODELS["ir"], threads=1)
    assert runtime.infer(np.zeros((1, 64, 64, 3), np.uint8)).shape == (1, 4)
    runtime.close()
    assert (tmp_path / "missing").exists() is (cache == "missing/deeper")


@pytest.mark.parametrize("name", MODELS)
def test_runtime_needs_no_torch_and_no_other_vendor(
    name: str, python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    model, count = TINY / MODELS[name], BATCH[name] or 1
    others = tuple({"torch", "onnx", "cv2", *engines()} - {runtime_for(model).extra})
    code = """
from pathlib import Path
import numpy as np
from edgefg.runtime import load
frames = np.zeros((int(sys.argv[2]), 64, 64, 3), np.uint8)
print(load(Path(sys.argv[1]), threads=1).infer(frames).shape)
"""
    result = python(code, model, count, blocked=others)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"({count}, 4)"


def test_openvino_is_imported_without_its_telemetry(tiny: Callable[[str], Path]) -> None:
    code = (
        "import sys, edgefg; edgefg.Classifier(sys.argv[1]); "
        "print([name for name in sys.modules if name.startswith('openvino_telemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tiny("ir"))], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(sys.platform != "linux", reason="the stack's layout is Linux's")
def test_opening_leaves_the_stack_of_signal_handlers_alone(tiny: Callable[[str], Path]) -> None:
    """OpenVINO installs one of its own and frees it later; the next signal would crash the process."""
    code = (
        "import ctypes, faulthandler, sys, edgefg, numpy\n"
        "def stack():\n"
        "    found = (ctypes.c_size_t * 3)()\n"
        "    ctypes.CDLL(None).sigaltstack(None, found)\n"
        "    return found[0]\n"
        "faulthandler.enable()\n"  # installs a stack
        "before = stack()\n"
        "with edgefg.Classifier(sys.argv[1], threads=1) as classifier:\n"
        "    classifier.predict(numpy.zeros((64, 64, 3), numpy.uint8))\n"
        "    print(before != 0, stack() == before)\n"
        "print(stack() == before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tiny("ir"))], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True", "True"]
