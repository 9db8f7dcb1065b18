from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from edgefg.errors import DataError, ExportError, WeightsError
from edgefg.export.search import trials
from edgefg.export.search.candidates import Student, Variant
from edgefg.export.search.context import SearchContext
from edgefg.export.search.trials import Quartiles, measure_again, measure_untrained, run_trial, train
from edgefg.preprocess import InputSpec
from edgefg.settings.distillation import DistillationConfig
from edgefg.settings.quantization import Precision
from edgefg.training.models.network import Network
from tests.export.search.searching import PRUNED, RESNET, accuracy

EFFICIENTNET = replace(RESNET, student=Student(backbone="test_efficientnet", weights="none"))
BOTH: tuple[Precision, Precision] = ("int8", "fp32")


class Steps:
    """Stand-ins for the costly steps; they write empty model files."""

    latency = 2.0

    def __init__(self) -> None:
        self.written: list[str] = []
        self.measured: list[list[str]] = []

    def write_onnx(self, network: Network, spec: InputSpec, path: Path) -> None:
        path.touch()

    def write_graph(self, context: SearchContext, source: Path, spec: InputSpec, precision: str, folder: Path) -> None:
        assert source.is_file()
        self.written.append(precision)
        (folder / "model.xml").touch()

    def measure(
        self, context: SearchContext, models: Mapping[Variant, Path], *, trained: bool = True
    ) -> dict[Variant, Quartiles]:
        assert all(path.is_file() for path in models.values())
        self.measured.append([f"{architecture.name} {precision}" for architecture, precision in models])
        return dict.fromkeys(models, (0.9 * self.latency, self.latency, 1.1 * self.latency))

    def export(self, context: SearchContext, checkpoint: Path, variant: Variant, stage: Any) -> Path:
        model = context.model(variant, stage)
        model.parent.mkdir(parents=True)
        model.touch()
        return model


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    steps = Steps()
    monkeypatch.setattr(trials, "write_onnx", steps.write_onnx)
    monkeypatch.setattr(trials, "_write_graph", steps.write_graph)
    monkeypatch.setattr(trials, "measure_latency", steps.measure)
    monkeypatch.setattr(trials, "export_candidate", steps.export)
    monkeypatch.setattr(trials, "train", lambda context, architecture, stage: context.out / "student.safetensors")
    monkeypatch.setattr(trials, "accuracy_of", lambda model: accuracy(0.8))
    monkeypatch.setattr(trials, "failures", lambda context, model: ())
    return steps


def test_untrained_networks_are_measured_once_and_deleted(context: SearchContext, steps: Steps) -> None:
    found = measure_untrained(context, [RESNET, PRUNED], BOTH)
    names = ["test_resnet-32 int8", "test_resnet-32 fp32", "test_resnet-32-macs80 int8", "test_resnet-32-macs80 fp32"]
    assert [one.name for one in found] == names
    assert {(one.stage, one.latency_ms, one.machine, one.accuracy) for one in found} == {
        ("untrained", 2.0, "here", None)
    }
    assert not list(context.out.rglob("model.xml"))
    assert measure_untrained(context, [RESNET, PRUNED], BOTH) == found
    assert steps.measured == [names]


def test_an_architecture_that_cannot_be_exported_is_skipped(
    context: SearchContext, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(network: Network, spec: InputSpec, path: Path) -> None:
        if type(network.backbone).__name__ == "ResNet":
            raise ExportError("cannot be exported")
        path.touch()

    monkeypatch.setattr(trials, "write_onnx", refusing)
    found = measure_untrained(context, [RESNET, EFFICIENTNET], ["fp32"])
    assert [one.name for one in found] == ["test_efficientnet-32 fp32"]
    assert context.skipped == ["test_resnet-32 fp32: cannot be exported"]


def test_a_precision_that_cannot_be_written_leaves_the_other(
    context: SearchContext, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(context: SearchContext, source: Path, spec: InputSpec, precision: str, folder: Path) -> None:
        if precision == "int8":
            raise ExportError("INT8 lacks this operator")
        steps.write_graph(context, source, spec, precision, folder)

    monkeypatch.setattr(trials, "_write_graph", refusing)
    assert [one.name for one in measure_untrained(context, [RESNET], BOTH)] == ["test_resnet-32 fp32"]
    assert context.skipped == ["test_resnet-32 int8: INT8 lacks this operator"]


def test_a_search_that_was_interrupted_between_two_precisions_resumes(
    context: SearchContext, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(context: SearchContext, source: Path, spec: InputSpec, precision: str, folder: Path) -> None:
        steps.write_graph(context, source, spec, precision, folder)
        if precision == "fp32":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trials, "_write_graph", interrupted)
        with pytest.raises(KeyboardInterrupt):
            measure_untrained(context, [RESNET], BOTH)
    assert [path.parent.name for path in context.out.rglob("model.xml")] == ["int8"]
    assert len(measure_untrained(context, [RESNET], BOTH)) == 2
    assert steps.written == ["int8", "fp32", "fp32"]


def test_weights_that_cannot_be_loaded_stop_before_anything_is_written(
    context: SearchContext, steps: Steps, tmp_path: Path
) -> None:
    absent = replace(RESNET, student=Student(backbone="test_resnet", weights=str(tmp_path / "absent.pth")))
    with pytest.raises(WeightsError, match="absent"):
        measure_untrained(context, [EFFICIENTNET, absent], ["fp32"])
    assert not list(context.out.iterdir())


def test_an_architecture_with_other_weights_is_refused(context: SearchContext, steps: Steps) -> None:
    measure_untrained(context, [RESNET], ["fp32"])
    other = replace(RESNET, student=Student(backbone="test_resnet"))
    complaint = r"test_resnet-32 fp32 in .* is test_resnet=none with 1 of the MACs, not test_resnet=hub with 1 of the"
    with pytest.raises(DataError, match=complaint):
        measure_untrained(context, [other], ["fp32"])


def test_a_trial_is_measured_and_compared_with_the_teacher(context: SearchContext, steps: Steps) -> None:
    found = run_trial(context, PRUNED, "short", BOTH)
    assert [(one.precision, one.accuracy, one.artifact) for one in found] == [
        ("int8", accuracy(0.8), "short/test_resnet-32-macs80/int8/model.xml"),
        ("fp32", accuracy(0.8), "short/test_resnet-32-macs80/fp32/model.xml"),
    ]
    assert [one.drop for one in found] == pytest.approx([10, 10])
    assert run_trial(context, PRUNED, "short", BOTH) == found
    assert len(steps.measured) == 1


def test_a_trial_skips_precisions_that_cannot_be_exported(
    context: SearchContext, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(context: SearchContext, checkpoint: Path, variant: Variant, stage: Any) -> Path:
        if variant[1] == "int8":
            raise ExportError("NNCF could not quantise the network")
        return steps.export(context, checkpoint, variant, stage)

    monkeypatch.setattr(trials, "export_candidate", refusing)
    assert [one.precision for one in run_trial(context, RESNET, "full", BOTH)] == ["fp32"]
    assert context.skipped == ["test_resnet-32 int8 (full): NNCF could not quantise the network"]
    assert run_trial(context, RESNET, "short", ["int8"]) == []


@pytest.mark.parametrize("distillation", [DistillationConfig(temperature=4.0), DistillationConfig(feature_weight=0.1)])
def test_every_training_has_the_searchs_settings(
    context: SearchContext, monkeypatch: pytest.MonkeyPatch, distillation: DistillationConfig
) -> None:
    seen: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def step(name: str, *args: Any, **options: Any) -> Path:
        seen[name] = args, options
        return context.out / name

    monkeypatch.setattr(trials, "distill", lambda *args, **options: step("distill", *args, **options))
    monkeypatch.setattr(trials, "prune", lambda *args, **options: step("prune", *args, **options))
    context = replace(context, candidates=replace(context.candidates, distillation=distillation))
    assert train(context, RESNET, "short") == context.out / "distill"
    assert train(context, PRUNED, "short") == context.out / "prune"
    args, options = seen["distill"]
    assert args[2:] == (context.out / "short" / "test_resnet-32", context.training_of(RESNET, "short"))
    assert (options["student"], options["weights"], options["distillation"]) == ("test_resnet", "none", distillation)
    # The cache has no feature maps.
    assert options["teacher_cache"] == (None if distillation.needs_maps else context.teacher_cache)
    args, options = seen["prune"]
    assert args[0] == context.out / "distill"
    assert args[2:] == (
        context.out / "short" / "test_resnet-32-macs80",
        context.pruning_training_of(PRUNED, "short"),
        context.pruning_of(PRUNED),
    )
    assert (options["teacher_path"], options["distillation"]) == (context.teacher, distillation)
    assert options["teacher_cache"] == context.teacher_cache


def test_latencies_of_another_machine_are_measured_again(context: SearchContext, steps: Steps) -> None:
    untrained = measure_untrained(context, [RESNET], ["fp32"])
    (trained,) = run_trial(context, RESNET, "full", ["fp32"])
    measure_again(context)
    assert len(steps.measured) == 2  # nothing: it is the same machine
    steps.latency = 3.0
    other = replace(context, machine="another")
    measure_again(other)
    assert run_trial(other, RESNET, "full", ["fp32"]) == [
        replace(trained, machine="another", latency_low_ms=2.7, latency_ms=3.0, latency_high_ms=pytest.approx(3.3))
    ]
    assert [one.latency_ms for one in measure_untrained(other, [RESNET], ["fp32"])] != [untrained[0].latency_ms]
    steps.latency = 4.0
    measure_again(replace(other, search=replace(other.search, measure_again=True)))
    assert run_trial(other, RESNET, "full", ["fp32"])[0].latency_ms == 4.0


def test_a_candidate_without_its_artifact_is_made_again(context: SearchContext, steps: Steps) -> None:
    run_trial(context, RESNET, "full", BOTH)
    shutil.rmtree(context.model((RESNET, "int8"), "full").parent)
    measure_again(context)
    assert [context.record((RESNET, precision), "full").is_file() for precision in BOTH] == [False, True]
    assert len(run_trial(context, RESNET, "full", BOTH)) == 2
    assert steps.measured[1:] == [["test_resnet-32 int8"]]
