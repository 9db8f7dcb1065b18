"""What can only be known on an NVIDIA GPU: build, parity, leaks, threads, graphs, speed. See conftest.py."""

from __future__ import annotations

import json
import re
import shutil
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgefg import Classifier, IntegrityError
from edgefg.export.build_plan import Here
from edgefg.export.to_tensorrt import BuildReport, build_engine
from edgefg.preprocess import UInt8Array
from edgefg.runtime import describe_gpu
from edgefg.runtimes.cuda import CudaPython
from tests.threads import run_together

pytestmark = pytest.mark.gpu
Plans = dict[str, BuildReport]
Frames = list[UInt8Array]
# Of the greatest logit, against ONNX Runtime on the same graph; an 8-bit value may land one step away.
_TOLERANCE = {"fp32": 1e-3, "fp16": 0.02, "int8": 0.1}


def test_build(plans: Plans, note: dict[str, Any]) -> None:
    for precision, report in plans.items():
        assert not report.kept
        assert report.precision == precision
        note[precision] = {"parent, greatest difference": report.verified.golden.parent_logits}


def test_building_again_does_nothing(plans: Plans, models: dict[str, Path]) -> None:
    for precision, model in models.items():
        before = Path(plans[precision].plan).stat().st_mtime_ns
        assert build_engine([model]).kept
        assert Path(plans[precision].plan).stat().st_mtime_ns == before


def test_parity_with_the_onnx(plans: Plans, models: dict[str, Path], frames: Frames, note: dict[str, Any]) -> None:
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: pip install 'edgefg[onnxruntime]'")
    for precision, report in plans.items():
        with Classifier(report.plan) as plan, Classifier(models[precision]) as parent:
            found = np.stack([plan.predict(frame).logits for frame in frames])
            expected = np.stack([parent.predict(frame).logits for frame in frames])
        deviation = float(np.abs(found - expected).max() / np.abs(expected).max())
        agreement = float((found.argmax(1) == expected.argmax(1)).mean())
        note[precision] = {"deviation": deviation, "agreement": agreement}
        assert deviation <= _TOLERANCE[precision], precision


def test_no_leak_over_10000_runs(plans: Plans, frames: Frames, note: dict[str, Any]) -> None:
    report = next(iter(plans.values()))
    with Classifier(report.plan) as classifier:
        for frame in frames:
            classifier.predict(frame)
        free, resident = describe_gpu()[1], _resident()
        for i in range(10_000):
            classifier.predict(frames[i % len(frames)])
        note["GPU bytes"], note["resident bytes"] = free - describe_gpu()[1], _resident() - resident
    assert note["GPU bytes"] < 4 << 20
    assert note["resident bytes"] < 16 << 20


def test_no_leak_over_50_classifiers(plans: Plans, frames: Frames, note: dict[str, Any]) -> None:
    report = next(iter(plans.values()))
    free = []
    for _ in range(50):
        with Classifier(report.plan) as classifier:
            classifier.predict(frames[0])
        free.append(describe_gpu()[1])
    note["GPU bytes"] = free[4] - free[-1]
    assert note["GPU bytes"] < 16 << 20


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
    for precision, report in plans.items():
        monkeypatch.setattr(CudaPython, "graphs", True)
        with Classifier(report.plan) as classifier:
            with_graph = _times(classifier, frames)
            logits = classifier.predict(frames[0]).logits
        monkeypatch.setattr(CudaPython, "graphs", False)
        with Classifier(report.plan) as classifier:
            without = _times(classifier, frames)
            np.testing.assert_array_equal(classifier.predict(frames[0]).logits, logits)
        note[precision] = {"p50 ms with": with_graph, "p50 ms without": without}
    assert "no CUDA graph" not in caplog.text


def test_int8_against_fp16(models: dict[str, Path], here: Here, note: dict[str, Any], tmp_path: Path) -> None:
    if not {"int8", "fp16"} <= models.keys():
        pytest.skip("needs an INT8 and an FP16 model; name both in EDGEFG_GPU_MODELS")
    report = build_engine([models["int8"], models["fp16"]], out=tmp_path / "auto")
    note["p50 ms"] = {candidate.precision: candidate.p50_ms for candidate in report.candidates}
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
    for precision, report in plans.items():
        times = tmp_path / f"{precision}.json"
        command = [tool, f"--loadEngine={report.plan}", "--useCudaGraph", "--noDataTransfers", f"--exportTimes={times}"]
        subprocess.run(command, check=True, capture_output=True)
        bare = statistics.median(entry["computeMs"] for entry in json.loads(times.read_text()))
        with Classifier(report.plan) as classifier:
            size = classifier.manifest.input
            ours = _times(classifier, _network_frames(frames, size.height, size.width))
        note[precision] = {"trtexec compute p50 ms": bare, "Classifier.predict p50 ms": ours, "ratio": ours / bare}
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


def _resident() -> int:
    """Return this process's resident memory in bytes."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
