"""The cache of plans and the settings of options; `test_build` has the builds themselves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgefg.artifact.hashes import FileInfo
from edgefg.errors import DataError
from edgefg.export.tensorrt.builder import cached_plan, describe, keep_plan, settings_of
from edgefg.export.tensorrt.worker import BuildConfig, BuildDevice
from tests.simulated.install import simulated_device

ONNX = FileInfo(name="model.onnx", size=1, sha256="a" * 64)
HERE = BuildDevice("Orin", "8.7", 8 << 30, 4 << 30, "10.3.0")


def test_settings() -> None:
    assert settings_of(1, None, "none", None, 3) == BuildConfig()
    assert settings_of(2, 8, "ampere-plus", 256, 5) == BuildConfig(
        batches=(1, 2, 8), hardware_compatible="ampere-plus", workspace=256, optimization_level=5
    )
    with pytest.raises(DataError, match="--max-batch 2 is less than --batch 4; it must be at least as large"):
        settings_of(4, 2, "none", None, 3)


def test_whatever_changes_a_plan_changes_its_name(cache: Path) -> None:
    names = {
        cached_plan(onnx, precision, settings, here)
        for onnx in (ONNX, FileInfo(name="model.onnx", size=1, sha256="b" * 64))
        for precision in ("int8", "fp16")
        for settings in (BuildConfig(), BuildConfig(workspace=64))
        for here in (HERE, BuildDevice("Thor", "11.0", 8 << 30, 4 << 30, "10.3.0"))
    }
    assert len(names) == 16
    renamed = FileInfo(name="other.onnx", size=1, sha256="a" * 64)
    busy = BuildDevice("Orin", "8.7", 8 << 30, 1 << 30, "10.3.0")
    assert cached_plan(renamed, "int8", BuildConfig(), busy) in names


def test_the_oldest_plans_go(cache: Path) -> None:
    (cache / "new.plan").parent.mkdir(parents=True)
    (cache / "new.plan").write_bytes(b"plan")
    for age in range(10):
        kept = cache / "plans" / f"{age}.plan"
        keep_plan(cache / "new.plan", kept)
        os.utime(kept, (age, age))
    assert sorted(path.stem for path in (cache / "plans").iterdir()) == [str(age) for age in range(2, 10)]


def test_without_a_cache_nothing_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGEFG_CACHE", "")
    assert cached_plan(ONNX, "int8", BuildConfig(), HERE) is None
    keep_plan(tmp_path / "never read.plan", None)


def test_the_device_is_described_by_a_child() -> None:
    with simulated_device() as books:
        found = describe()
        books.assert_clean()
    assert (found.gpu, found.compute_capability, found.tensorrt) == ("Simulated Orin", "8.7", "10.16.1.11")
