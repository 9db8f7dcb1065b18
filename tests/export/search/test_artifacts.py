from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from edgefg.artifact.manifest import Manifest, read_manifest
from edgefg.errors import ExportError, TrainingError
from edgefg.export.search import artifacts
from edgefg.export.search.artifacts import accuracy_of, export_candidate, failures, select_again
from edgefg.export.search.candidates import Variant
from edgefg.export.search.context import SearchContext
from edgefg.settings.options import with_options
from edgefg.settings.quantization import QuantizationConfig
from tests.conftest import TINY
from tests.export.search.searching import RESNET, accuracy

INT8: Variant = (RESNET, "int8")
FP32: Variant = (RESNET, "fp32")
CHECKPOINT = Path("student.safetensors")


class Exporter:
    """Stand-in for the export: copies a committed artifact, and gives it an accuracy."""

    def __init__(self, rewrite: Callable[..., Manifest]) -> None:
        self.rewrite = rewrite
        self.calls: list[dict[str, Any]] = []
        self.top1 = {artifacts._CALIBRATED: 0.8, artifacts._QAT: 0.85}
        self.refused: tuple[str, ...] = ()

    def export(self, checkpoint: Path, out: Path, **options: Any) -> Path:
        if out.name in self.refused:
            raise ExportError("NNCF could not quantise the network")
        self.calls.append({"checkpoint": checkpoint, **options})
        shutil.copytree(TINY / "ir", out)
        self.rewrite(out / "model.xml", accuracy=accuracy(self.top1.get(out.name, 0.9)))
        return out / "model.xml"


@pytest.fixture
def exporter(rewrite: Callable[..., Manifest], monkeypatch: pytest.MonkeyPatch) -> Exporter:
    exporter = Exporter(rewrite)
    monkeypatch.setattr(artifacts, "export_checkpoint", exporter.export)
    monkeypatch.setattr(artifacts, "qat", lambda checkpoint, data, out, config, **options: out / "qat.safetensors")
    return exporter


@pytest.fixture
def with_qat(context: SearchContext) -> SearchContext:
    return replace(context, search=with_options(context.search, qat_epochs=1))


def test_a_candidate_is_exported_once_with_the_searchs_settings(context: SearchContext, exporter: Exporter) -> None:
    quantization = QuantizationConfig(num_samples=8, max_int8_drop=1.0)
    context = replace(context, candidates=replace(context.candidates, quantization=quantization))
    model = export_candidate(context, CHECKPOINT, INT8, "full")
    assert model == context.model(INT8, "full")
    assert accuracy_of(model) == accuracy(0.9)
    assert failures(context, model) == ()  # it was not compared
    export_candidate(context, CHECKPOINT, INT8, "full")
    export_candidate(context, CHECKPOINT, INT8, "short")
    export_candidate(context, CHECKPOINT, FP32, "full")
    assert [(one["precision"], one["quantization"]) for one in exporter.calls] == [
        ("int8", quantization),
        ("int8", QuantizationConfig(num_samples=8)),  # layers are chosen for finalists only
        ("fp32", QuantizationConfig()),
    ]
    assert {one["gate"] for one in exporter.calls} == {None}


def test_the_more_accurate_of_calibration_and_training_is_kept(with_qat: SearchContext, exporter: Exporter) -> None:
    model = export_candidate(with_qat, CHECKPOINT, INT8, "full")
    assert accuracy_of(model) == accuracy(0.85)
    trained = with_qat.folder(RESNET, "full") / "qat" / "qat.safetensors"
    assert [(one["checkpoint"], one["reference"]) for one in exporter.calls] == [
        (CHECKPOINT, None),
        (trained, CHECKPOINT),
    ]
    export_candidate(with_qat, CHECKPOINT, INT8, "short")  # calibrated only
    assert len(exporter.calls) == 3


def test_the_artifact_that_keeps_the_gate_is_kept(
    with_qat: SearchContext, exporter: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = artifacts._QAT
    monkeypatch.setattr(
        artifacts, "failures", lambda context, model: ("a class loses more",) * (model.parent.name == refused)
    )
    model = export_candidate(with_qat, CHECKPOINT, INT8, "full")
    assert accuracy_of(model) == accuracy(0.8)
    record = with_qat.record(INT8, "full")
    record.touch()
    select_again(with_qat)
    assert record.exists()
    # Another gate, which the other one keeps.
    refused = artifacts._CALIBRATED
    select_again(with_qat)
    assert accuracy_of(model) == accuracy(0.85)
    assert not record.exists()
    assert read_manifest(model) == read_manifest(model.parent.with_name(artifacts._QAT) / "model.xml")
    assert len(exporter.calls) == 2


def test_a_training_in_int8_that_fails_leaves_calibration(
    with_qat: SearchContext, exporter: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> Path:
        raise TrainingError("the loss is not finite")

    monkeypatch.setattr(artifacts, "qat", failing)
    assert accuracy_of(export_candidate(with_qat, CHECKPOINT, INT8, "full")) == accuracy(0.8)
    assert with_qat.skipped == ["test_resnet-32 int8-qat (full): the loss is not finite"]


def test_a_finalist_that_fails_both_ways_is_an_export_error(with_qat: SearchContext, exporter: Exporter) -> None:
    exporter.refused = (artifacts._CALIBRATED, artifacts._QAT)
    with pytest.raises(ExportError, match="neither calibration nor quantisation-aware training succeeded"):
        export_candidate(with_qat, CHECKPOINT, INT8, "full")
    assert len(with_qat.skipped) == 2
