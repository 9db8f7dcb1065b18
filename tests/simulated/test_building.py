"""Building on the simulated device: what a right build gives, what fails, what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.simulated.books import Books, Fault, expect_violation
from tests.simulated.install import simulated_device
from tests.simulated.plan_format import VERSIONS
from tests.simulated.rig import DYNAMIC, STATIC, Build, Rig, expected, images


@pytest.mark.parametrize("major", [10, 11])
def test_a_right_build(major: int) -> None:
    with simulated_device(major=major) as books:
        build = Build(STATIC.read_bytes())
        assert build.parsed
        cache = build.config.create_timing_cache(b"")
        assert build.config.set_timing_cache(cache, False)
        made = build.run()
        assert made is not None
        assert tuple(made[24:28]) == VERSIONS[major]
        rig = Rig(books, made)
        np.testing.assert_array_equal(rig.infer(images()[0]), expected(STATIC, images())[0])
        rig.close()
        again = build.config.create_timing_cache(memoryview(cache.serialize()))
        assert build.config.set_timing_cache(again, False)
        books.configure(gpu="Simulated Thor")
        assert not build.config.set_timing_cache(again, False)
        assert [found["workspace"] for found in books.builds()] == [1 << 30]
        del build
        books.assert_clean()


def test_a_monitor_is_told_and_may_stop(books: Books) -> None:
    build, told = Build(STATIC.read_bytes()), list[str]()

    class Monitor(build.trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            told.append(f"{phase_name} {num_steps}")

        def step_complete(self, phase_name: str, step: int) -> bool:
            told.append(f"{phase_name} {step}")
            return step < 2

        def phase_finish(self, phase_name: str) -> None:
            told.append(phase_name)

    monitor = Monitor()
    build.config.progress_monitor = monitor
    assert build.run() is None
    assert told[0] == "Building Engine 4"
    assert told[-1] == "Building Engine"


def test_a_free_batch_needs_a_profile(books: Books) -> None:
    build = Build(DYNAMIC.read_bytes())
    assert build.run() is None
    assert "no optimization profile" in build.said[-1]
    profile = build.builder.create_optimization_profile()
    name = build.network.get_input(0).name
    with pytest.raises(ValueError, match="min <= opt <= max"):
        profile.set_shape(name, (2, 64, 64, 3), (1, 64, 64, 3), (4, 64, 64, 3))
    assert build.config.add_optimization_profile(profile) == -1
    profile.set_shape(name, (1, 64, 64, 3), (2, 64, 64, 3), (4, 64, 64, 3))
    assert build.config.add_optimization_profile(profile) == 0
    made = build.run()
    assert made is not None
    rig = Rig(books, made)
    assert [tuple(shape) for shape in rig.engine.get_tensor_profile_shape(name, 0)][1] == (2, 64, 64, 3)
    assert not books.violations


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"build_fails_above": 1 << 29}, "out of memory"),
        ({"build_fails_first": 1}, "out of memory"),
        ({"build_error": "Error Code 10: Internal Error (no implementation)"}, "no implementation"),
        ({"faults": [Fault("build_serialized_network")]}, "Internal Error"),
    ],
)
def test_builds_that_fail(config: dict[str, Any], said: str) -> None:
    with simulated_device(**config) as books:
        build = Build(STATIC.read_bytes())
        assert build.run() is None
        assert said in build.said[-1]
        build.config.set_memory_pool_limit(build.trt.MemoryPoolType.WORKSPACE, 1 << 28)
        assert (build.run() is None) is ("build_error" in config)
        assert not books.violations


def test_wrong_builds(books: Books) -> None:
    with expect_violation(books, "not strongly typed"):
        assert Build(STATIC.read_bytes(), typed=False).run() is None
    with expect_violation(books, "at least one output"):
        assert Build(b"garbage").run() is None
    build = Build(STATIC.read_bytes())
    with expect_violation(books, "ignore_mismatch"):
        build.config.set_timing_cache(build.config.create_timing_cache(b""), True)
    with expect_violation(books, "flags that TensorRT 10 lacks"):
        build.builder.create_network(1 << 9)


def _graph(*nodes: Any, kind: int = TensorProto.FLOAT, **constants: np.ndarray) -> bytes:
    values = [helper.make_tensor_value_info(name, kind, [1, 4]) for name in "xy"]
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    return helper.make_model(helper.make_graph(list(nodes), "g", values[:1], values[1:], tensors)).SerializeToString()


ONE, ZERO = np.array([0.1], np.float32), np.zeros(1, np.int8)
REFUSED = {
    "must feed a Cast": _graph(helper.make_node("Identity", ["x"], ["y"]), kind=TensorProto.UINT8),
    "symmetric": _graph(helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"]), s=ONE, z=ZERO + 3),
    "UINT8 quantisation": _graph(
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"]), s=ONE, z=ZERO.astype(np.uint8)
    ),
    "int32 constant": _graph(helper.make_node("DequantizeLinear", ["b", "s"], ["y"]), s=ONE, b=np.array([1], np.int32)),
    "all be positive": _graph(helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"]), s=-ONE, z=ZERO),
    "antialias": _graph(helper.make_node("Resize", ["x", "", "", "n"], ["y"], antialias=1), n=np.array([1, 4])),
}


@pytest.mark.parametrize("words", REFUSED)
def test_graphs_that_are_not_parsed(words: str, books: Books) -> None:
    build = Build(REFUSED[words])
    assert not build.parsed
    assert words in build.parser.get_error(0).desc()
    assert build.parser.get_error(0).node_operator()
