"""Look-ups on NVIDIA machines; `test_doctor` has the advice for whole machines."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest

from edgefg import nvidia
from edgefg.nvidia import Gpu
from tests.conftest import ROOT


def test_a_version_that_is_none_fits_nothing() -> None:
    assert not nvidia.fits("10.3-jetson", ">=10")
    assert not nvidia.fits(None, ">=10")
    assert nvidia.fits("10.3.0.30", ">=10.3,<12")
    assert nvidia.fits("12.0rc1", ">=11")


@pytest.mark.parametrize(("number", "cuda"), [(13000, "13.0"), (12080, "12.8"), (0, None)])
def test_the_driver_s_cuda(monkeypatch: pytest.MonkeyPatch, number: int, cuda: str | None) -> None:
    runtime = types.SimpleNamespace(cudaDriverGetVersion=lambda: (0, number))
    monkeypatch.setitem(sys.modules, "cuda.bindings", types.SimpleNamespace(runtime=runtime))
    assert nvidia._driver_cuda() == cuda


def test_without_cuda_python_the_driver_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert nvidia._driver_cuda() is None


def test_the_lowest_tensorrt_is_that_of_the_extra() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.findall(r'"tensorrt>=([\d.]+)"', project) == [nvidia.LOWEST_TENSORRT]


def test_a_machine_without_nvidia(tmp_path: Path) -> None:
    assert nvidia.find_jetson(tmp_path) is None
    assert nvidia.find_driver(tmp_path) is None
    assert (
        nvidia.advise(
            tmp_path, None, None, Gpu(problem="none"), nvidia.TensorRTStatus(version=None, supported=None, binding=None)
        )
        == []
    )
