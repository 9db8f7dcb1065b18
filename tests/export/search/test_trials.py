from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from edgefg.errors import EdgefgError, ExportError, HardwareError, TrainingError
from edgefg.export.distill.distill import distill
from edgefg.export.export import export_checkpoint
from edgefg.export.quantize.quantizer import Quantizer
from edgefg.export.search import artifacts, trials
from edgefg.export.search.candidates import render, space_of
from edgefg.export.search.search import compress
from edgefg.export.tracing.onnx_exporter import write_onnx
from edgefg.preprocess import InputSpec
from edgefg.training.models.network import Network
from tests.export.search.searching import HERE, STUDENTS, request


def test_a_shape_that_cannot_be_made_is_left_out_and_said(
    birds_teacher: Path, two_birds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = write_onnx

    def refusing(network: Network, spec: InputSpec, path: Path) -> None:
        if type(network.backbone).__name__ == "ResNet":
            raise ExportError("cannot be exported")
        write(network, spec, path)

    monkeypatch.setattr(trials, "write_onnx", refusing)
    asked = request(budget_ms=1e-6, space=space_of(students=STUDENTS, sizes=[32], macs=[1.0], precisions=["fp32"]))
    front, _ = compress(birds_teacher, two_birds, tmp_path / "out", asked, hardware=HERE)
    assert [candidate.name for candidate in front.candidates] == ["test_efficientnet-32 fp32"]
    assert front.left_out == ("test_resnet-32 fp32: cannot be exported",)
    assert "left out: test_resnet-32" in render(front)
    alone = replace(asked, space=space_of(students=STUDENTS[:1], sizes=[32], macs=[1.0], precisions=["fp32"]))
    with pytest.raises(ExportError, match="none of the 1 candidates can be made; test_resnet-32"):
        compress(birds_teacher, two_birds, tmp_path / "alone", alone, hardware=HERE)


def test_a_precision_that_cannot_be_made_leaves_the_other(
    birds_teacher: Path, two_birds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(*_: Any) -> Path:
        raise ExportError("no such operator in INT8")

    monkeypatch.setattr(Quantizer, "write", refusing)
    space = space_of(students=STUDENTS[:1], sizes=[32], macs=[1.0], precisions=["int8", "fp32"])
    front, _ = compress(birds_teacher, two_birds, tmp_path / "out", request(budget_ms=1e-6, space=space), hardware=HERE)
    assert [candidate.name for candidate in front.candidates] == ["test_resnet-32 fp32"]
    assert front.left_out == ("test_resnet-32 int8: no such operator in INT8",)


def test_what_fails_after_training_is_left_out_too(
    birds_teacher: Path, two_birds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = export_checkpoint

    def refusing(checkpoint: Path, out: Path, **options: Any) -> Path:
        if "test_resnet" in str(out) or options["precision"] == "int8":
            raise ExportError("NNCF could not quantise the network")
        return export(checkpoint, out, **options)

    monkeypatch.setattr(artifacts, "export_checkpoint", refusing)
    asked = request(space=space_of(students=STUDENTS, sizes=[32], macs=[1.0], precisions=["int8", "fp32"]))
    said: list[str] = []
    out = tmp_path / "out"
    front, verified = compress(birds_teacher, two_birds, out, asked, hardware=HERE, say=said.append)
    assert verified is not None
    assert front.chosen == "test_efficientnet-32 fp32"
    assert sorted(front.left_out) == [
        "test_efficientnet-32 int8 (full): NNCF could not quantise the network",
        "test_efficientnet-32 int8 (short): NNCF could not quantise the network",
        "test_resnet-32 fp32 (short): NNCF could not quantise the network",
        "test_resnet-32 int8 (short): NNCF could not quantise the network",
    ]
    # When it happens, not hours later.
    assert [line for line in said if "left out" in line] == [f"left out: {line}" for line in front.left_out]
    assert (
        compress(birds_teacher, two_birds, out, asked, hardware=HERE)[0] == front
    )  # what was measured is not measured again


def test_a_training_in_int8_that_fails_leaves_calibration(
    birds_teacher: Path, two_birds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> Path:
        raise TrainingError("the loss is not finite")

    monkeypatch.setattr(artifacts, "qat", failing)
    space = space_of(students=STUDENTS[:1], sizes=[32], macs=[1.0], precisions=["int8"])
    asked = request(space=space, training=replace(request().training, qat_epochs=1))
    front, _ = compress(birds_teacher, two_birds, tmp_path / "out", asked, hardware=HERE)
    assert front.chosen == "test_resnet-32 int8"
    assert front.left_out == ("test_resnet-32 int8 (full, trained in INT8): the loss is not finite",)


def test_a_shape_that_cannot_be_trained_leaves_the_others(
    birds_teacher: Path, two_birds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distil = distill
    failure: EdgefgError = TrainingError("the loss is not finite")

    def failing(*args: Any, **options: Any) -> Path:
        if options["student"] == "test_resnet":
            raise failure
        return distil(*args, **options)

    monkeypatch.setattr(trials, "distill", failing)
    space = space_of(students=STUDENTS, sizes=[32], macs=[1.0], precisions=["fp32"])
    alone = space_of(students=STUDENTS[:1], sizes=[32], macs=[1.0], precisions=["fp32"])
    asked = request(space=space, finalists=2)
    front, _ = compress(birds_teacher, two_birds, tmp_path / "out", asked, hardware=HERE)
    assert front.chosen == "test_efficientnet-32 fp32"
    assert front.left_out == ("test_resnet-32 (full): the loss is not finite",)
    # Not where all would fail alike.
    with pytest.raises(TrainingError, match="not finite"):
        compress(birds_teacher, two_birds, tmp_path / "alone", replace(asked, space=alone), hardware=HERE)
    failure = HardwareError("cannot train on 1 × 'cuda'")
    with pytest.raises(HardwareError):
        compress(birds_teacher, two_birds, tmp_path / "out", asked, hardware=HERE)
    failure = ExportError("cannot write model.xml")
    failure.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(ExportError, match="cannot write"):
        compress(birds_teacher, two_birds, tmp_path / "out", asked, hardware=HERE)
    failure = ExportError("OpenVINO could not write the IR")
    monkeypatch.setattr("edgefg.export.search.context._LEAST_SPACE", 2**62)
    with pytest.raises(ExportError, match="could not write the IR"):
        compress(birds_teacher, two_birds, tmp_path / "out", asked, hardware=HERE)
