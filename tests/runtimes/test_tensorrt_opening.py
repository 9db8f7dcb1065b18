"""Opening a plan on the simulated device: whatever does not belong here is a typed error, and nothing leaks."""

from __future__ import annotations

import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgefg import Classifier, DeviceMismatchError, EdgefgError, IntegrityError, RuntimeUnavailableError
from edgefg.artifact.manifest import read_manifest
from edgefg.errors import BuildError
from edgefg.export.tensorrt import rebuild
from edgefg.preprocess import InputSpec
from edgefg.runtime import load
from tests.conftest import Run
from tests.runtimes.test_tensorrt import BINDINGS, frames, write_bare
from tests.simulated.books import Fault
from tests.simulated.install import simulated_device

Rewrite = Callable[..., object]


def photo(plan: Path) -> Path:
    path = plan.with_name("photo.png")
    cv2.imwrite(str(path), frames(1)[0])
    return path


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"major": 11}, r"built by TensorRT 10\.16\.1\.11, here is 11\.4\.0\.106"),
        ({"gpu": "Simulated Xavier", "compute_capability": (7, 2)}, r"built on Simulated Orin .*8\.7.*Xavier \(7\.2\)"),
        ({"gpu": "Simulated Orin Nano"}, r"built on Simulated Orin .*here is Simulated Orin Nano \(8\.7\)"),
    ],
)
def test_another_device(config: dict[str, object], said: str, plan: Path) -> None:
    with simulated_device(**config) as books:
        with pytest.raises(DeviceMismatchError, match=said) as caught:
            Classifier(plan)
        assert f"edgefg build {plan.parent / 'model.onnx'} --to tensorrt" in str(caught.value)
        assert books.calls["deserialize_cuda_engine"] == 0
        books.assert_clean()
        old = plan.read_bytes()
        rebuild(plan)
        with Classifier(plan) as classifier:
            found = classifier.predict(frames(1)[0])
        assert plan.read_bytes() != old
        assert read_manifest(plan).plan.gpu == books.config.gpu
        with Classifier(plan.with_name("model.onnx"), threads=1) as parent:
            np.testing.assert_array_equal(found.logits, parent.predict(frames(1)[0]).logits)
        books.assert_clean()


def test_a_rebuild_that_fails_leaves_the_plan(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEFG_CACHE", "")
    before = {path.name: path.read_bytes() for path in plan.parent.iterdir()}
    failing = simulated_device(major=11, build_error="Error Code 10: could not find any implementation")
    with failing, pytest.raises(BuildError, match="could not find any implementation"):
        rebuild(plan)
    plan.with_name("model.onnx").write_bytes(b"another")
    with simulated_device(major=11), pytest.raises(BuildError, match=r"is not the file that engine\.plan was built"):
        rebuild(plan)
    plan.with_name("model.onnx").unlink()
    with simulated_device(major=11), pytest.raises(BuildError, match=r"is not the file that engine\.plan was built"):
        rebuild(plan)
    del before["model.onnx"]
    assert {path.name: path.read_bytes() for path in plan.parent.iterdir()} == before


def test_truncated_at_every_4_kib(plan: Path, rewrite: Rewrite) -> None:
    whole = plan.read_bytes()
    bare = plan.with_name("bare.plan")
    with simulated_device() as books:
        for size in range(0, len(whole), 4096):
            plan.write_bytes(whole[:size])
            with pytest.raises(IntegrityError, match="its manifest says"):
                Classifier(plan)
            bare.write_bytes(whole[:size])
            with pytest.raises(RuntimeUnavailableError, match=r"bare\.plan"):
                load(bare)
        rewrite(plan)  # a manifest that vouches for the truncated plan: TensorRT itself refuses
        with pytest.raises(DeviceMismatchError, match=r"TensorRT .* refused .*engine\.plan: .*corrupt.*: edgefg build"):
            Classifier(plan)
        rebuild(plan)
        Classifier(plan).close()
        books.assert_clean()


def test_what_cannot_be_built_again_is_told_as_it_is(plan: Path, run: Run) -> None:
    model = plan.with_name("model.onnx")
    model.write_bytes(model.read_bytes() + b"!")
    with simulated_device():
        status, _, err = run("predict", model, photo(plan), "--rebuild")
    assert status == 2
    assert "its manifest says" in err
    assert "copy the artifact again" in err
    with pytest.raises(BuildError, match="does not say what it was built from"):
        rebuild(model)


def test_too_little_memory_says_nothing_against_a_plan(plan: Path, run: Run) -> None:
    before = plan.read_bytes()
    with simulated_device() as books:
        books.faults.append(Fault("deserialize_cuda_engine", error=2))
        status, _, err = run("predict", plan, photo(plan), "--rebuild")
        assert status == 2
        assert "stop what else uses the GPU" in err
        books.assert_clean()
    assert plan.read_bytes() == before


def test_a_runtime_that_goes_inside_another_ones_call_leaves_it_its_gpu(plan: Path) -> None:
    with simulated_device(devices=2) as books:
        from cuda.bindings import runtime as rt

        with Classifier(plan) as one:
            two = [Classifier(plan, device="GPU:1")]
            with one._runtime._cuda.current():  # type: ignore[attr-defined]
                two.clear()
                assert rt.cudaGetDevice() == (0, 0)
        books.assert_clean()


def test_a_power_cut_between_two_files_is_healed(plan: Path, run: Run) -> None:
    with simulated_device() as books:
        plan.write_bytes(plan.read_bytes() + b"of another build")
        with pytest.raises(IntegrityError, match=r"build it again: edgefg build .*model\.onnx --to tensorrt"):
            Classifier(plan)
        rebuild(plan)
        with Classifier(plan, verify=True) as classifier:
            assert classifier.predict(frames(1)[0]).label in classifier.labels
        plan.write_bytes(plan.read_bytes()[:-9])
        assert run("predict", plan, photo(plan))[0] == 2
        assert run("predict", plan, photo(plan), "--rebuild")[0] == 0
        Classifier(plan, verify=True).close()
        books.assert_clean()


def test_rebuild_excludes_a_trusted_key(plan: Path, run: Run) -> None:
    status, _, err = run("predict", plan, photo(plan), "--rebuild", "--trusted-key", "public.pem")
    assert (status, "--rebuild and --trusted-key exclude each other" in err) == (2, True)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.binary(max_size=400), keep=st.sampled_from([0, 4, 8, 28, 64]))
def test_random_bytes(data: bytes, keep: int, built: Path, tmp_path: Path) -> None:
    path = tmp_path / "bare.plan"
    path.write_bytes(built.read_bytes()[:keep] + data)
    with simulated_device() as books:
        with pytest.raises(EdgefgError) as caught:
            load(path)
        assert "\n" not in str(caught.value)
        books.assert_clean()


def test_a_bare_plan_is_opened_on_the_callers_word(plan: Path) -> None:
    with simulated_device() as books:
        with Classifier(plan) as classifier:
            labels, expected = classifier.labels, classifier.predict(frames(1)[0])
        bare = shutil.copyfile(plan, plan.with_name("bare.engine"))
        with pytest.warns(UserWarning, match=r"bare\.engine has no manifest"):
            classifier = Classifier(bare, labels=labels, input=InputSpec(height=64, width=64))
        with classifier:
            np.testing.assert_array_equal(classifier.predict(frames(1)[0]).logits, expected.logits)
        books.assert_clean()


@pytest.mark.parametrize("error", [35, 100])
@BINDINGS
def test_no_driver_or_no_gpu(plan: Path, error: int, pycuda: bool) -> None:
    with simulated_device(pycuda=pycuda, driver_error=error) as books:
        with pytest.raises(RuntimeUnavailableError, match=r"GPU 0 cannot be used: .*edgefg doctor"):
            Classifier(plan)
        books.assert_clean()


def test_a_binding_that_is_too_new_leaves_the_other_one(plan: Path) -> None:
    with simulated_device(pycuda=True) as books:
        broken = types.ModuleType("cuda.bindings")
        broken.__version__, broken.runtime = "99", mock.Mock()  # type: ignore[attr-defined]
        broken.runtime.cudaGetDeviceCount.return_value = (35, None)
        broken.runtime.cudaGetErrorName.return_value = (0, b"cudaErrorInsufficientDriver")
        broken.runtime.cudaGetErrorString.return_value = (0, b"too old a driver")
        outer = types.ModuleType("cuda")
        outer.bindings = broken  # type: ignore[attr-defined]
        with mock.patch.dict(sys.modules, {"cuda": outer, "cuda.bindings": broken}):
            classifier = Classifier(plan)
        with classifier:
            assert classifier.predict(frames(1)[0]).label in classifier.labels
        books.assert_clean()


def test_tensorrt_that_does_not_start_is_a_typed_error(plan: Path) -> None:
    with simulated_device() as books:
        failing = mock.Mock(side_effect=TypeError("pybind11::init(): factory function returned nullptr"))
        told = pytest.raises(RuntimeUnavailableError, match=r"TensorRT 10\.16\.1\.11 does not start")
        with mock.patch.object(sys.modules["tensorrt"], "Runtime", failing), told:
            Classifier(plan)
        books.assert_clean()


def test_neither_binding_is_installed(plan: Path) -> None:
    missing = dict.fromkeys(("cuda", "cuda.bindings", "pycuda", "pycuda.driver"))
    told = pytest.raises(RuntimeUnavailableError, match="neither cuda-python nor PyCUDA")
    with simulated_device(), mock.patch.dict(sys.modules, missing), told:
        Classifier(plan)


@pytest.mark.parametrize(
    ("device", "said"), [("CPU", "choose GPU"), ("GPU:1", "there are 1 GPUs"), ("gpu:x", "choose GPU")]
)
def test_a_device_that_is_not_there(device: str, said: str, plan: Path) -> None:
    with simulated_device() as books:
        with pytest.raises(RuntimeUnavailableError, match=said):
            Classifier(plan, device=device)
        books.assert_clean()


def test_the_second_gpu(plan: Path) -> None:
    with simulated_device(devices=2) as books:
        with Classifier(plan, device="cuda:1") as classifier:
            classifier.predict(frames(1)[0])
        books.assert_clean()


@pytest.mark.parametrize("content", ["two inputs", "float input", "no logits"])
def test_a_plan_that_is_no_classifier(content: str, tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    kind = TensorProto.FLOAT if content == "float input" else TensorProto.UINT8
    inputs = [helper.make_tensor_value_info("images", kind, [1, 8, 8, 3])]
    if content == "two inputs":
        inputs.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1, 8, 8, 3]))
    node = helper.make_node("Cast", ["images"], ["logits"], to=TensorProto.FLOAT)
    output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 8, 8, 3])
    graph = helper.make_graph([node], "g", inputs, [output])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9), tmp_path / "m.onnx")
    path = write_bare(tmp_path / "engine.plan", tmp_path / "m.onnx")
    with simulated_device() as books:
        with pytest.raises(RuntimeUnavailableError, match=r"expected one input uint8 \[N, H, W, 3\] and one output"):
            load(path)
        books.assert_clean()
