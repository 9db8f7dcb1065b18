"""What can only be known on an NVIDIA GPU: build, parity, batches, leaks, threads, graphs, speed. See conftest.py."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edgefg import Classifier, IntegrityError
from edgefg.artifact.manifest import read_manifest
from edgefg.errors import DeviceMismatchError
from edgefg.export import tensorrt
from edgefg.export.tensorrt.build import BuildReport, build_engine
from edgefg.preprocess import UInt8Array
from edgefg.runtimes.cuda import CudaPython
from tests.gpu.conftest import FREE_BATCH, Model
from tests.gpu.trend import leaks, levels
from tests.threads import run_together

pytestmark = pytest.mark.gpu
Models = dict[str, Model]
Plans = dict[str, BuildReport]
Frames = list[UInt8Array]
# Of the greatest logit, against ONNX Runtime on the same graph. An 8-bit value may land one step away: with and without
# its optimisations ONNX Runtime itself differs by 0.054 on the tiny INT8 network and these frames.
_TOLERANCE = {"fp32": 1e-3, "fp16": 0.02, "int8": 0.2}


def test_build(plans: Plans, models: Models, note: dict[str, Any]) -> None:
    for name, report in plans.items():
        assert not report.kept
        assert report.precision == read_manifest(models[name].path).precision
        note[name] = {"parent, greatest difference": report.verified.golden.parent_logits}


def test_building_again_does_nothing(plans: Plans, models: Models) -> None:
    for name, model in models.items():
        before = Path(plans[name].plan).stat().st_mtime_ns
        assert build_engine([model.path], settings=model.settings).kept
        assert Path(plans[name].plan).stat().st_mtime_ns == before


def test_parity_with_the_onnx(plans: Plans, models: Models, frames: Frames, note: dict[str, Any]) -> None:
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: pip install 'edgefg[onnxruntime]'")
    for name, report in plans.items():
        with Classifier(report.plan) as plan, Classifier(models[name].path) as parent:
            found = np.stack([plan.predict(frame).logits for frame in frames])
            expected = np.stack([parent.predict(frame).logits for frame in frames])
        deviation = float(np.abs(found - expected).max() / np.abs(expected).max())
        agreement = float((found.argmax(1) == expected.argmax(1)).mean())
        note[name] = {"deviation": deviation, "agreement": agreement}
        assert deviation <= _TOLERANCE[report.precision], name


def test_every_batch_that_a_profile_allows(plans: Plans, frames: Frames) -> None:
    if FREE_BATCH not in plans:
        pytest.skip("needs the tiny network of free batch, in whose place EDGEFG_GPU_MODELS names others")
    with Classifier(plans[FREE_BATCH].plan) as classifier:
        assert classifier.manifest.plan is not None
        assert classifier.manifest.plan.batches == (1, 4, 16)
        expected = np.stack([classifier.predict(frame).logits for frame in frames])
        for count in (1, 3, 4, 16, 17, 64):
            found = np.stack([prediction.logits for prediction in classifier.predict_batch(frames[:count])])
            assert np.abs(found - expected[:count]).max() <= _TOLERANCE["fp32"] * np.abs(expected).max(), count


def test_a_plan_of_another_device_is_rebuilt(
    plans: Plans, frames: Frames, rewrite: Callable[..., object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EDGEFG_CACHE", str(tmp_path / "cache"))  # else there is nothing left to build
    report = plans.get("int8") or next(iter(plans.values()))
    plan = Path(shutil.copytree(Path(report.plan).parent, tmp_path / "copy")) / Path(report.plan).name
    info = read_manifest(plan).plan
    assert info is not None
    rewrite(plan, plan=msgspec.structs.replace(info, gpu="another GPU"))
    with pytest.raises(DeviceMismatchError, match="another GPU"):
        Classifier(plan)
    tensorrt.rebuild(plan)
    with Classifier(plan) as again, Classifier(report.plan) as before:
        found, expected = (np.stack([c.predict(frame).logits for frame in frames]) for c in (again, before))
    assert read_manifest(plan).plan == info
    assert np.abs(found - expected).max() <= _TOLERANCE[report.precision] * np.abs(expected).max()


def test_no_leak_over_10000_runs(plans: Plans, frames: Frames, note: dict[str, Any]) -> None:
    report = next(iter(plans.values()))
    with Classifier(report.plan) as classifier:

        def work(runs: int = 2_000) -> None:
            for i in range(runs):
                classifier.predict(frames[i % len(frames)])

        work(len(frames))
        note["GPU bytes"], note["resident bytes"] = levels(work)
    assert not leaks(note["GPU bytes"], 4 << 20)
    assert not leaks(note["resident bytes"], 16 << 20)


def test_no_leak_over_50_classifiers(plans: Plans, frames: Frames, note: dict[str, Any]) -> None:
    report = next(iter(plans.values()))

    def work() -> None:
        for _ in range(10):
            with Classifier(report.plan) as classifier:
                classifier.predict(frames[0])

    work()
    note["GPU bytes"], note["resident bytes"] = levels(work)
    assert not leaks(note["GPU bytes"], 16 << 20)


def test_threads(plans: Plans, frames: Frames) -> None:
    report = next(iter(plans.values()))
    with Classifier(report.plan) as classifier:
        expected = [classifier.predict(frame).logits for frame in frames]

        def work(first: int) -> None:
            for i in range(first, first + 200):
                found = classifier.predict(frames[i % len(frames)]).logits
                np.testing.assert_array_equal(found, expected[i % len(frames)])

        run_together(work)


def test_graph_on_and_off(
    plans: Plans,
    frames: Frames,
    note: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name, report in plans.items():
        monkeypatch.setattr(CudaPython, "graphs", True)
        with Classifier(report.plan) as classifier:
            with_graph = _times(classifier, frames)
            logits = classifier.predict(frames[0]).logits
        monkeypatch.setattr(CudaPython, "graphs", False)
        with Classifier(report.plan) as classifier:
            without = _times(classifier, frames)
            np.testing.assert_array_equal(classifier.predict(frames[0]).logits, logits)
        note[name] = {"p50 ms with": with_graph, "p50 ms without": without}
    assert "no CUDA graph" not in caplog.text


def test_int8_against_fp16(models: Models, note: dict[str, Any], tmp_path: Path) -> None:
    if not {"int8", "fp16"} <= models.keys():
        pytest.skip("needs an INT8 and an FP16 model; name both in EDGEFG_GPU_MODELS")
    report = build_engine([models["int8"].path, models["fp16"].path], out=tmp_path / "auto")
    note["p50 ms"] = {candidate.precision: candidate.p50_ms for candidate in report.candidates}
    assert [candidate.problem for candidate in report.candidates] == ["", ""]
    fastest = min(report.candidates, key=lambda candidate: candidate.p50_ms or 0.0)
    assert report.precision == fastest.precision


def test_an_altered_plan_is_not_opened(plans: Plans, tmp_path: Path) -> None:
    plan = Path(next(iter(plans.values())).plan)
    shutil.copytree(plan.parent, tmp_path, dirs_exist_ok=True)
    data = bytearray(plan.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / plan.name).write_bytes(data)
    with pytest.raises(IntegrityError):
        Classifier(tmp_path / plan.name)


def test_against_trtexec(plans: Plans, frames: Frames, note: dict[str, Any], tmp_path: Path) -> None:
    tool = shutil.which("trtexec") or shutil.which("/usr/src/tensorrt/bin/trtexec")
    if tool is None:
        pytest.skip("trtexec is not installed (on a Jetson: apt-get install libnvinfer-bin)")
    for name, report in plans.items():
        times = tmp_path / f"{len(note)}.json"
        command = [tool, f"--loadEngine={report.plan}", "--useCudaGraph", "--noDataTransfers", f"--exportTimes={times}"]
        subprocess.run(command, check=True, capture_output=True)
        bare = statistics.median(entry["computeMs"] for entry in json.loads(times.read_text()))
        with Classifier(report.plan) as classifier:
            size = classifier.manifest.input
            ours = _times(classifier, _network_frames(frames, size.height, size.width))
        note[name] = {"trtexec compute p50 ms": bare, "Classifier.predict p50 ms": ours, "ratio": ours / bare}
        assert bare > 0


def _times(classifier: Classifier, frames: Frames) -> float:
    """Return the median time of a prediction in milliseconds."""
    times = []
    for turn in range(3):
        for frame in frames:
            start = time.perf_counter()
            classifier.predict(frame)
            if turn:
                times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def _network_frames(frames: Frames, height: int, width: int) -> Frames:
    return [np.ascontiguousarray(np.resize(frame, (height, width, 3))) for frame in frames]
