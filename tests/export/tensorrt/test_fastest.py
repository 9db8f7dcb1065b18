"""Several models of one network: all are built and measured, and the fastest is kept."""

from __future__ import annotations

from pathlib import Path

import msgspec
import onnx
import pytest

from edgefg.artifact.hashes import file_info
from edgefg.artifact.manifest import encode_manifest, manifest_path, read_manifest
from edgefg.errors import DataError, InferenceError, RuntimeUnavailableError
from edgefg.export import tensorrt
from edgefg.export.tensorrt import build
from edgefg.export.tensorrt.build import build_engine
from edgefg.export.tensorrt.builder import describe
from edgefg.export.tensorrt.worker import BuildDevice
from tests.export.tensorrt.test_build import copy
from tests.simulated.books import Books
from tests.simulated.install import simulated_device


@pytest.mark.parametrize(("slow", "winner"), [("QuantizeLinear", "fp32"), ("/only-of-fp32/", "int8")])
def test_the_faster_model_is_kept(slow: str, winner: str, qdq: Path, tmp_path: Path, cache: Path) -> None:
    fp32 = copy("onnx", tmp_path / "fp32")
    graph = onnx.load(fp32)
    graph.graph.doc_string = "/only-of-fp32/"
    onnx.save(graph, fp32)
    manifest = read_manifest(fp32)
    files = tuple(file_info(fp32.parent / file.name) for file in manifest.files)
    manifest_path(fp32).write_bytes(encode_manifest(msgspec.structs.replace(manifest, files=files)))
    with simulated_device(slow={slow: 0.003}) as books:
        report = build_engine([qdq, fp32], out=tmp_path / "out")
        books.assert_clean()
    times = {candidate.precision: candidate.p50_ms or 0.0 for candidate in report.candidates}
    assert sorted(times) == ["fp32", "int8"]
    assert report.precision == winner == min(times, key=lambda precision: times[precision])
    with simulated_device(slow={slow: 0.003}):
        assert build_engine([fp32, qdq], out=tmp_path / "out").kept
        assert build_engine([{"fp32": fp32, "int8": qdq}[winner]], out=tmp_path / "out").kept
    assert (tmp_path / "out" / "model.onnx").read_bytes() == {"fp32": fp32, "int8": qdq}[winner].read_bytes()
    with simulated_device(major=11):
        tensorrt.rebuild(Path(report.plan))
        assert read_manifest(Path(report.plan)).precision == winner


def test_a_plan_of_one_model_is_compared_when_there_are_two(qdq: Path, tmp_path: Path, device: Books) -> None:
    fp32 = copy("onnx", tmp_path / "fp32")
    build_engine([qdq], out=tmp_path / "out")
    assert build_engine([qdq, fp32], out=tmp_path / "out", precision="int8").kept
    report = build_engine([qdq, fp32], out=tmp_path / "out")
    assert len(report.candidates) == 2
    assert all(candidate.p50_ms for candidate in report.candidates)


def test_plans_that_cannot_be_measured_are_still_proven(
    qdq: Path, tmp_path: Path, device: Books, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: object) -> tuple[int, dict[int, float]]:
        raise InferenceError("no memory for both")

    monkeypatch.setattr(build, "select_fastest", fail)
    report = build_engine([qdq, copy("onnx", tmp_path / "fp32")], out=tmp_path / "out")
    assert report.precision == "int8"
    assert "they cannot be measured, the first one is taken: no memory for both" in caplog.messages
    info = read_manifest(Path(report.plan)).plan
    assert info is not None
    assert info.among == ()


def test_precision_chooses_among_the_models(qdq: Path, tmp_path: Path, device: Books) -> None:
    fp32 = copy("onnx", tmp_path / "fp32")
    report = build_engine([qdq, fp32], out=tmp_path / "out", precision="int8")
    assert [candidate.precision for candidate in report.candidates] == ["int8"]
    with pytest.raises(DataError, match="--precision fp16 was given, but the models are fp32, int8"):
        build_engine([qdq, fp32], precision="fp16")


def test_models_of_two_networks(tmp_path: Path, device: Books) -> None:
    model = copy("onnx", tmp_path / "artifact")
    other = copy("onnx", tmp_path / "other", labels=("a", "b", "c", "d"))
    with pytest.raises(DataError, match="has other labels"):
        build_engine([model, other])


def test_a_model_that_cannot_be_built_leaves_room_for_the_other(
    qdq: Path, tmp_path: Path, device: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = iter([describe()])

    def next_description() -> BuildDevice:
        for here in described:
            return here
        raise RuntimeUnavailableError("too little memory to look")

    monkeypatch.setattr(build, "describe", next_description)
    report = build_engine([qdq, copy("onnx", tmp_path / "fp32")], out=tmp_path / "out")
    assert [candidate.problem for candidate in report.candidates] == ["", "too little memory to look"]
