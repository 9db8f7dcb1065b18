"""The simulated bindings: PyCUDA's rules, names and types of the real ones, and child processes."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.runtimes.test_vendor_names import _missing, stubs
from tests.simulated.books import Fault, expect_violation
from tests.simulated.install import simulated_device
from tests.simulated.rig import IN, OUT, STATIC, Rig, expected, images, in_thread, make_logger, make_plan
from tests.simulated.tensorrt_core import BoundEnum

__all__ = ["stubs"]


@pytest.mark.parametrize("binding", ["trt10", "trt11", "cuda13"])
def test_every_simulated_name_is_real(binding: str, stubs: Path) -> None:
    with simulated_device(major=11 if binding == "trt11" else 10):
        root = "cuda.bindings.runtime" if binding == "cuda13" else "tensorrt"
        module, names = importlib.import_module(root), list[str]()
        for name, value in vars(module).items():
            if not name.startswith("_") and name != "simulated":
                names.append(f"{root}.{name}")
                if isinstance(value, type) and not name.startswith("cuda"):
                    public = [member for member in dir(value) if not member.startswith("_")]
                    names += [f"{root}.{name}.{member}" for member in public if member not in OURS]
    assert len(names) > 40
    assert not _missing(binding, stubs, names)


OURS = ("site", "enums", "device", "plan", "session")
"""Attributes of the simulation's own."""


def test_the_majors_differ() -> None:
    with simulated_device(major=10):
        ten = importlib.import_module("tensorrt")
    with simulated_device(major=11):
        eleven = importlib.import_module("tensorrt")
    flags = [{name: int(flag) for name, flag in m.BuilderFlag.__members__.items()} for m in (ten, eleven)]
    assert (flags[0]["STRIP_PLAN"], flags[1]["STRIP_PLAN"]) == (19, 18)
    for name in ("BuilderFlag.INT8", "BuilderFlag.FP16", "NetworkDefinitionCreationFlag.EXPLICIT_BATCH"):
        group, member = name.split(".")
        assert hasattr(getattr(ten, group), member)
        assert not hasattr(getattr(eleven, group), member)
    assert (ten.__version__, eleven.__version__) == ("10.16.1.11", "11.4.0.106")
    assert "tensorrt" not in sys.modules


def test_types_are_as_strict_as_pybind11s(rig: Rig) -> None:
    trt = rig.trt
    assert trt.DataType.FLOAT != 0
    assert isinstance(trt.DataType.FLOAT, BoundEnum)
    with pytest.raises(TypeError):
        1 << trt.BuilderFlag.TF32
    shape = rig.engine.get_tensor_shape(rig.engine[0])
    assert shape == (1, 64, 64, 3)
    with pytest.raises(TypeError):
        assert shape == rig.engine.get_tensor_shape(rig.engine[0])
    with pytest.raises(AttributeError):
        rig.context.profile = 1
    with pytest.raises(TypeError, match="No constructor defined"):
        trt.ICudaEngine()
    with pytest.raises(TypeError, match=r"ILogger\.__init__\(\) must be called"):
        type("L", (trt.ILogger,), {"__init__": lambda self: None})()
    with pytest.raises(TypeError, match="ILogger"):
        trt.Runtime(None)
    assert trt.nptype(trt.float16) is np.float16
    with pytest.raises(TypeError, match="numpy"):
        trt.nptype(trt.bfloat16)


# PyCUDA


class PyRig:
    """A right user of PyCUDA and TensorRT: every call within the primary context."""

    def __init__(self, serialized: bytes) -> None:
        self.cuda, self.trt = importlib.import_module("pycuda.driver"), importlib.import_module("tensorrt")
        self.said: list[str] = []
        self.cuda.init()
        self.primary = self.cuda.Device(0).retain_primary_context()
        self.primary.push()
        self.logger = make_logger(self.trt, self.said)
        self.runtime = self.trt.Runtime(self.logger)
        self.engine = self.runtime.deserialize_cuda_engine(serialized)
        self.context = self.engine.create_execution_context()
        self.stream = self.cuda.Stream(1)
        self.device = [self.cuda.mem_alloc(size) for size in (IN, OUT)]
        self.pinned = [self.cuda.pagelocked_empty(*what) for what in ((IN, np.uint8), ((4,), np.float32))]
        for i, memory in enumerate(self.device):
            assert self.context.set_tensor_address(self.engine[i], int(memory))

    def infer(self, image: np.ndarray) -> np.ndarray:
        self.pinned[0][:] = image.ravel()
        self.cuda.memcpy_htod_async(self.device[0], self.pinned[0], self.stream)
        assert self.context.execute_async_v3(self.stream.handle)
        self.cuda.memcpy_dtoh_async(self.pinned[1], self.device[1], self.stream)
        self.stream.synchronize()
        return self.pinned[1].copy()

    def close(self) -> None:
        self.context = None
        self.engine = None
        self.runtime = None
        for memory in self.device:
            memory.free()
        for array in self.pinned:
            array.base.free()
        self.stream = None
        self.cuda.Context.pop()
        self.primary.detach()


def test_right_use_of_pycuda() -> None:
    with simulated_device(pycuda=True) as books:
        rig = PyRig(make_plan())
        for image in images(2):
            np.testing.assert_array_equal(rig.infer(image), expected(STATIC, image[np.newaxis])[0])
        assert rig.cuda.Device(0).compute_capability() == (8, 7)
        assert rig.cuda.mem_get_info()[1] == 8 << 30
        assert not hasattr(rig.stream, "begin_capture")
        with pytest.raises(ImportError):
            importlib.import_module("cuda.bindings.runtime")
        rig.close()
        books.assert_clean()


def _outside(rig: PyRig) -> None:
    rig.cuda.Context.pop()
    with pytest.raises(rig.cuda.LogicError, match="invalid device context"):
        rig.cuda.mem_alloc(8)


def _freed_elsewhere(rig: PyRig) -> None:
    with pytest.warns(UserWarning, match="out-of-thread"):
        in_thread(rig.device[0].free)


def _freed_twice(rig: PyRig) -> None:
    rig.device[0].free()
    with pytest.raises(rig.cuda.LogicError, match="device_allocation::free"):
        rig.device[0].free()


def _pageable(rig: PyRig) -> None:
    with pytest.raises(rig.cuda.LogicError, match="invalid argument"):
        rig.cuda.memcpy_htod_async(rig.device[0], np.zeros(IN, np.uint8), rig.stream)


def _left_on_the_stack(rig: PyRig) -> None:
    in_thread(lambda: rig.primary.push())


PYCUDA = {
    "cuMemAlloc on a thread without a current context": _outside,
    "freed outside its context": _freed_elsewhere,
    "device_allocation::free of what was freed": _freed_twice,
    "neither the device's nor page-locked": _pageable,
    "PyCUDA aborts the process": _left_on_the_stack,
    "on another thread than retained it": lambda rig: in_thread(lambda: rig.primary.detach()),
    "execute_async_v3 on a thread that never set": lambda rig: in_thread(
        lambda: rig.context.execute_async_v3(rig.stream.handle)
    ),
}


@pytest.mark.parametrize("words", PYCUDA)
def test_wrong_use_of_pycuda(words: str) -> None:
    with simulated_device(pycuda=True) as books:
        rig = PyRig(make_plan())
        with expect_violation(books, words):
            PYCUDA[words](rig)


def test_pycuda_needs_init() -> None:
    with simulated_device(pycuda=True) as books, expect_violation(books, "before pycuda.driver.init"):
        cuda = importlib.import_module("pycuda.driver")
        with pytest.raises(cuda.LogicError):
            cuda.Device(0)


@pytest.mark.parametrize(("error", "kind"), [(2, "MemoryError"), (700, "LogicError"), (719, "LaunchError")])
def test_pycudas_errors(error: int, kind: str) -> None:
    with simulated_device(pycuda=True, faults=[Fault("cudaMalloc", at=3, error=error)]):
        rig = PyRig(make_plan())
        with pytest.raises(getattr(rig.cuda, kind), match=r"cuMemAlloc failed: .* \(simulated\)"):
            rig.cuda.mem_alloc(8)


# Child processes

CHILD = """
import importlib, json, sys
import tensorrt as trt
from tests.simulated.rig import Build, STATIC
try:
    cuda = importlib.import_module("cuda.bindings.runtime").__name__
except ImportError:
    cuda = importlib.import_module("pycuda.driver").__name__
build = Build(STATIC.read_bytes())
made = build.run()
print(json.dumps([trt.__version__, cuda, made is not None, build.said]))
"""


def child(**environment: str) -> tuple[int, list[Any]]:
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=False)
    return done.returncode, json.loads(done.stdout) if done.stdout else [done.stderr]


@pytest.mark.parametrize("pycuda", [False, True])
def test_a_child_process(pycuda: bool) -> None:
    with simulated_device(major=11, pycuda=pycuda, build_fails_first=1) as books:
        status, (version, cuda, made, said) = child()
        assert (status, version, made) == (0, "11.4.0.106", False)
        assert cuda == ("pycuda.driver" if pycuda else "cuda.bindings.runtime")
        assert "[simulated] Error Code 1: Cuda Runtime (out of memory)" in said
        assert child()[1][2] is True
        assert len({found["process"] for found in books.builds()}) == 2
        books.assert_clean()


def test_a_child_that_is_killed() -> None:
    with simulated_device(build_killed_first=1):
        assert child()[0] == -9
        assert child()[0] == 0


def test_a_childs_violations_reach_the_parent() -> None:
    with simulated_device() as books:
        code = "from tests.simulated.rig import Build, STATIC; Build(STATIC.read_bytes(), typed=False).run()"
        subprocess.run([sys.executable, "-c", code], check=True)
        with pytest.raises(AssertionError, match=r"in process \d+: build_serialized_network: .*strongly typed"):
            books.assert_clean()
