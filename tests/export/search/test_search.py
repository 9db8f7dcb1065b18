from __future__ import annotations

import errno
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from edgefg import Classifier, cli
from edgefg.artifact.hashes import sha256
from edgefg.artifact.manifest import read_manifest
from edgefg.artifact.stages import DistillStage, PruneStage, decode_stages
from edgefg.errors import DataError, WeightsError
from edgefg.export.distill.distill import distill
from edgefg.export.export import export_checkpoint
from edgefg.export.search import artifacts, search, trials
from edgefg.export.search.candidates import Candidate, Front, Precision, Shape, Student, read_front, render, space_of
from edgefg.export.search.search import compress
from edgefg.export.targets.openvino import OpenVINO
from edgefg.settings.distillation import DistillationConfig
from edgefg.settings.gate import Gate
from edgefg.settings.options import with_options
from edgefg.settings.quantization import QuantizationConfig
from tests.export.search.searching import HERE, STUDENTS, request
from tests.synthetic import write_dataset


class Counted:
    """Calls a function, counts how often, and is interrupted before the call of a given number."""

    def __init__(self, function: Callable[..., object], stop: int = -1) -> None:
        self.function, self.calls, self.stop = function, 0, stop

    def __call__(self, *args: Any, **others: Any) -> object:
        if self.calls == self.stop:
            raise KeyboardInterrupt
        self.calls += 1
        return self.function(*args, **others)


@pytest.fixture(scope="module")
def found(birds_teacher: Path, two_birds: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Front]:
    """A search that was interrupted in its second distillation and went on."""
    out = tmp_path_factory.mktemp("search") / "out"
    with pytest.MonkeyPatch.context() as patch:
        distil = Counted(distill, stop=1)
        patch.setattr(trials, "distill", distil)
        with pytest.raises(KeyboardInterrupt):
            compress(birds_teacher, two_birds, out, request(), hardware=HERE)
        assert not (out / search.FRONT).exists()
        again, measured = Counted(distil.function), Counted(trials._write_untrained)
        patch.setattr(trials, "distill", again)
        patch.setattr(trials, "_write_untrained", measured)
        front, verified = compress(birds_teacher, two_birds, out, request(), hardware=HERE)
        assert verified is not None
        assert verified.artifact == str(out / search.CHOSEN / "model.xml")
        assert (distil.calls, again.calls, measured.calls) == (1, 2, 0)
    return out, front


def test_every_candidate_is_measured_and_some_are_trained(found: tuple[Path, Front]) -> None:
    out, front = found
    stages = [candidate.stage for candidate in front.candidates]
    assert (len(stages), stages.count("short"), stages.count("full")) == (8, 2, 2)
    for candidate in front.candidates:
        assert 0 < candidate.latency_low_ms <= candidate.latency_ms <= candidate.latency_high_ms
        assert (candidate.accuracy is None) == (candidate.stage == "untrained")
    assert read_front(out / search.FRONT) == front
    assert not list(out.glob("untrained/**/model.xml"))


def test_the_chosen_artifact_is_whole_and_the_best_of_the_full_ones(
    found: tuple[Path, Front], birds_teacher: Path
) -> None:
    out, front = found
    full = [candidate for candidate in front.candidates if candidate.stage == "full"]
    chosen = next(candidate for candidate in full if candidate.name == front.chosen)
    assert chosen.accuracy is not None
    assert chosen.accuracy.top1 == max(one.accuracy.top1 for one in full if one.accuracy is not None)
    with Classifier(out / search.CHOSEN / "model.xml", verify=True) as classifier:
        assert classifier.manifest.provenance.teacher == sha256(birds_teacher)
        assert classifier.manifest.accuracy == chosen.accuracy
        assert classifier.manifest.precision == chosen.precision
    assert chosen.drop == pytest.approx(100 * (front.teacher.top1 - chosen.accuracy.top1))


@pytest.mark.parametrize("saturates", [True, False])
def test_the_width_of_weights_is_settled_by_the_first_run(
    birds_teacher: Path, two_birds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, saturates: bool,
) -> None:  # fmt: skip
    caplog.set_level("INFO", "edgefg")
    monkeypatch.setattr("edgefg.export.targets.target.lacks_vnni", lambda: saturates)
    space = space_of(students=STUDENTS[:1], sizes=[32], macs=[1.0], precisions=["int8"])
    asked = request(budget_ms=1e-6, space=space)
    compress(birds_teacher, two_birds, tmp_path / "out", asked, hardware=HERE)
    assert ("weights take 7 bits" in caplog.text) == saturates
    monkeypatch.setattr("edgefg.export.targets.target.lacks_vnni", lambda: not saturates)
    compress(birds_teacher, two_birds, tmp_path / "out", asked, hardware=HERE)
    quantization = replace(asked.training.quantization, reduce_range=not saturates)
    other = replace(asked, training=replace(asked.training, quantization=quantization))
    with pytest.raises(DataError, match="holds a search with another training"):
        compress(birds_teacher, two_birds, tmp_path / "out", other, hardware=HERE)
    idle = replace(other, space=replace(space, precisions=("fp32",)))
    with pytest.raises(DataError, match="--reduce-range applies only to --precision int8"):
        compress(birds_teacher, two_birds, tmp_path / "new", idle, hardware=HERE)


@pytest.mark.parametrize(
    ("changed", "precision", "complaint"),
    [
        ({"calibrator": "mse"}, "fp32", "--calibrator applies only to --precision int8"),
        ({"qat_epochs": 1}, "fp32", "--qat-epochs applies only to --precision int8"),
        ({"max_int8_drop": -1.0}, "int8", "--max-int8-drop -1.0 is out of range"),
        ({"max_int8_drop": float("nan")}, "int8", "--max-int8-drop nan is out of range"),
        ({"max_int8_drop": 1.0, "qat_epochs": 1}, "int8", "serve the same purpose"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_is_written(
    birds_teacher: Path, two_birds: Path, tmp_path: Path, changed: dict[str, Any], precision: str, complaint: str
) -> None:
    space = space_of(students=STUDENTS[:1], sizes=[32], macs=[1.0], precisions=[precision])
    epochs = changed.pop("qat_epochs", 0)
    training = replace(request().training, qat_epochs=epochs, quantization=QuantizationConfig(**changed))
    asked = request(space=space, training=training)
    with pytest.raises(DataError, match=complaint):
        compress(birds_teacher, two_birds, tmp_path / "out", asked, hardware=HERE)
    assert not (tmp_path / "out").exists()


def test_training_in_int8_neither_mixes_nor_averages() -> None:
    config = with_options(request().training.config, mix="snapmix", ema=0.9998, hue=0.1, randaugment=9)
    asked = replace(request().training, config=config, qat_epochs=1).in_int8(32)
    assert (asked.augmentation.mix, asked.schedule.ema, asked.augmentation.hue, asked.augmentation.randaugment) == (
        "none",
        0.0,
        0.0,
        0,
    )


def test_weights_that_cannot_be_had_stop_before_anything_is_made(
    birds_teacher: Path, two_birds: Path, tmp_path: Path
) -> None:
    students = [STUDENTS[1], Student(backbone="test_resnet", weights=str(tmp_path / "absent.pth"))]
    asked = request(space=space_of(students=students, sizes=[32], macs=[1.0], precisions=["fp32"]))
    with pytest.raises(WeightsError, match="absent"):
        compress(birds_teacher, two_birds, tmp_path / "out", asked, hardware=HERE)
    assert not (tmp_path / "out" / "untrained").exists()


def test_another_budget_begins_with_what_is_there(
    found: tuple[Path, Front], birds_teacher: Path, two_birds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, front = found
    distil = Counted(distill)
    monkeypatch.setattr(trials, "distill", distil)
    killed = out / "short" / ".int8.0a1b2c3d"  # what kill -9 leaves
    killed.mkdir()
    said: list[str] = []
    none, verified = compress(birds_teacher, two_birds, out, request(budget_ms=1e-4), hardware=HERE, say=said.append)
    assert none.chosen is verified is None
    assert not killed.exists()
    assert not (out / search.CHOSEN).exists()
    assert {candidate.stage for candidate in none.candidates} == {"untrained"}
    assert any("0 of 4 shapes keep 0.0001 ms" in line for line in said)
    assert compress(birds_teacher, two_birds, out, request(), hardware=HERE)[0] == front
    assert read_manifest(out / search.CHOSEN / "model.xml").accuracy is not None
    assert distil.calls == 0


def test_what_another_machine_measured_is_measured_again_and_nothing_trained(
    found: tuple[Path, Front], birds_teacher: Path, two_birds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, front = shutil.copytree(found[0], tmp_path / "out"), found[1]
    monkeypatch.setattr(trials, "distill", lambda *_, **__: pytest.fail("trained"))
    records = [msgspec.json.decode(path.read_bytes(), type=Candidate) for path in out.glob("untrained/*/*.json")]
    times = {(one.shape, one.precision): one.latency_ms for one in records}

    def slower(models: Iterable[tuple[Shape, Precision]], *_: Any) -> object:
        return {key: (times[key], 2 * times[key], 3 * times[key]) for key in models}

    monkeypatch.setattr(trials, "measure_latency", slower)
    other, _ = compress(birds_teacher, two_birds, out, request(machine="another"), hardware=HERE)
    assert other.machine == "another"
    trained = [one for one in other.candidates if one.stage != "untrained"]
    assert all(one.machine == "another" for one in other.candidates)
    assert all(one.latency_ms == 2 * times[one.shape, one.precision] for one in other.candidates)
    assert {(one.name, one.accuracy) for one in trained} == {
        (one.name, one.accuracy) for one in front.candidates if one.stage != "untrained"
    }
    times.update({key: 10 * value for key, value in times.items()})
    same, _ = compress(birds_teacher, two_birds, out, request(machine="another"), hardware=HERE)
    assert same == other
    again, _ = compress(birds_teacher, two_birds, out, request(machine="another", measure_again=True), hardware=HERE)
    assert all(one.latency_ms == 2 * times[one.shape, one.precision] for one in again.candidates)


def test_what_fails_the_gate_is_shown_and_not_taken(
    found: tuple[Path, Front], birds_teacher: Path, two_birds: Path
) -> None:
    out, _ = found
    asked = request(gate=Gate(max_drop=-100))
    none, verified = compress(birds_teacher, two_birds, out, asked, hardware=HERE)
    assert none.chosen is verified is None
    assert not (out / search.CHOSEN).exists()
    trained = [one for one in none.candidates if one.accuracy is not None]
    assert trained
    assert all("top-1 drops by" in failure for one in trained for failure in one.failures)
    told = render(none)
    assert "keeps budget and tolerated loss, but not the gate: top-1 drops by" in told
    assert f"gate: {trained[0].name} ({trained[0].stage}): top-1 drops by" in told
    assert compress(birds_teacher, two_birds, out, request(), hardware=HERE)[0].chosen is not None  # nothing is lost


def test_what_was_trained_in_full_is_not_forgotten_by_another_search(
    found: tuple[Path, Front], birds_teacher: Path, two_birds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, front = found
    monkeypatch.setattr(search, "finalists", lambda *_: [])
    again, _ = compress(birds_teacher, two_birds, out, request(), hardware=HERE)
    assert again == front


def test_a_full_disk_leaves_the_earlier_choice(
    found: tuple[Path, Front], birds_teacher: Path, two_birds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, front = found

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", fail)
    with pytest.raises(OSError, match="No space left"):
        compress(birds_teacher, two_birds, out, request(), hardware=HERE)
    assert read_front(out / search.FRONT) == front
    assert read_manifest(out / search.CHOSEN / "model.xml").accuracy is not None
    assert not list(out.glob(".chosen.*"))


def test_what_does_not_belong_together_is_refused_and_nothing_lost(
    found: tuple[Path, Front], birds_teacher: Path, two_birds: Path, tmp_path: Path
) -> None:
    out, _ = found
    before = sorted(out.rglob("*"))
    other = request(training=replace(request().training, short_epochs=2))
    with pytest.raises(DataError, match="a search with another training; give another --out"):
        compress(birds_teacher, two_birds, out, other, hardware=HERE)
    students = [replace(STUDENTS[0], weights="hub")]
    space = space_of(students=students, sizes=[32], macs=[1.0], precisions=["int8"])
    with pytest.raises(DataError, match="test_resnet=none, MACs 1, asked was test_resnet=hub, MACs 1; give another"):
        compress(birds_teacher, two_birds, out, request(space=space), hardware=HERE)
    assert sorted(out.rglob("*")) == before
    strange = write_dataset(tmp_path / "strange", classes=3, per_class=8, size=32, seed=5)
    with pytest.raises(DataError):
        compress(birds_teacher, strange, tmp_path / "out", request(), hardware=HERE)
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="is not empty and holds no search"):
        compress(birds_teacher, two_birds, tmp_path / "full", request(), hardware=HERE)
    old = msgspec.json.decode((out / "compress.json").read_bytes())
    assert old.pop("version") > 0  # as those before versions were
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "compress.json").write_bytes(msgspec.json.encode(old))
    with pytest.raises(DataError, match="holds a search with another version"):
        compress(birds_teacher, two_birds, tmp_path / "old", request(), hardware=HERE)


def test_no_short_distillation_where_it_has_nothing_to_decide(
    birds_teacher: Path, two_birds: Path, tmp_path: Path
) -> None:
    space = space_of(students=STUDENTS[:1], sizes=[32], macs=[1.0], precisions=["fp32"])
    front, _ = compress(birds_teacher, two_birds, tmp_path / "out", request(space=space), hardware=HERE)
    assert [candidate.stage for candidate in front.candidates] == ["full"]
    assert front.chosen == "test_resnet-32 fp32"


@pytest.mark.slow
def test_a_search_for_onnx_runtime(birds_teacher: Path, two_birds: Path, tmp_path: Path) -> None:
    space = space_of(students=STUDENTS[:1], sizes=[32], macs=[1.0], precisions=["int8", "fp32"])
    front, _ = compress(birds_teacher, two_birds, tmp_path / "out", request(target="onnx", space=space), hardware=HERE)
    with Classifier(tmp_path / "out" / search.CHOSEN / "model.onnx", verify=True) as classifier:
        assert classifier.runtime_version.startswith("onnxruntime")
    assert front.chosen is not None


def test_a_search_that_was_cut_off_between_two_precisions_goes_on(
    birds_teacher: Path, two_birds: Path, tmp_path: Path
) -> None:
    space = space_of(students=STUDENTS[:1], sizes=[32], macs=[1.0], precisions=["int8", "fp32"])
    asked = request(space=space, budget_ms=1e-4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OpenVINO, "emit", Counted(OpenVINO.emit, stop=0))
        with pytest.raises(KeyboardInterrupt):
            compress(birds_teacher, two_birds, tmp_path / "out", asked, hardware=HERE)
    assert [path.parent.name for path in tmp_path.rglob("model.xml")] == ["int8"]
    front, _ = compress(birds_teacher, two_birds, tmp_path / "out", asked, hardware=HERE)
    assert {candidate.precision for candidate in front.candidates} == {"int8", "fp32"}


@pytest.mark.slow
@pytest.mark.parametrize("distillation", [DistillationConfig(temperature=4.0), DistillationConfig(feature_weight=0.1)])
def test_whatever_is_learnt_reaches_every_training(
    birds_teacher: Path, two_birds: Path, tmp_path: Path, distillation: DistillationConfig
) -> None:
    space = space_of(students=STUDENTS[:1], sizes=[32], macs=[0.8], precisions=["fp32"])
    asked = request(space=space, training=replace(request().training, distillation=distillation))
    front, _ = compress(birds_teacher, two_birds, tmp_path / "out", asked, hardware=HERE)
    assert front.chosen is not None
    stages = decode_stages(read_manifest(tmp_path / "out" / search.CHOSEN / "model.xml").provenance.stages)
    distilled, pruned, _ = stages
    assert isinstance(distilled, DistillStage)
    assert distilled.distillation == distillation.resolved()
    assert isinstance(pruned, PruneStage)
    assert pruned.distillation == distillation.without_maps().resolved()


@pytest.mark.slow
def test_an_int8_finalist_may_be_trained_as_such_and_is_compared_with_fp32(
    birds_teacher: Path, two_birds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_of: list[Any] = []
    export = export_checkpoint

    def noted(checkpoint: Path, out: Path, **options: Any) -> Path:
        asked_of.append(options["reference"])
        return export(checkpoint, out, **options)

    def refused(_: object, model: Path) -> tuple[str, ...]:
        return ("a class loses more",) if model.parent.name == "int8-calibrated" else ()

    monkeypatch.setattr(artifacts, "export_checkpoint", noted)
    monkeypatch.setattr(artifacts, "failures", refused)
    space = space_of(students=STUDENTS[:1], sizes=[32], macs=[1.0], precisions=["int8"])
    asked = request(space=space, training=replace(request().training, qat_epochs=1))
    _, verified = compress(birds_teacher, two_birds, tmp_path / "out", asked, hardware=HERE)
    assert verified is not None
    made = read_manifest(tmp_path / "out" / search.CHOSEN / "model.xml").provenance
    assert made.parent == sha256(tmp_path / "out" / "full" / "test_resnet-32" / "qat" / "qat.safetensors")
    assert [stage["kind"] for stage in made.stages] == ["distill", "qat", "export"]
    assert asked_of == [None, tmp_path / "out" / "full" / "test_resnet-32" / "student.safetensors"]
    # Another gate, which only the other one keeps, takes the other one.
    monkeypatch.setattr(artifacts, "failures", lambda *found: () if refused(*found) else ("a class loses more",))
    compress(birds_teacher, two_birds, tmp_path / "out", asked, hardware=HERE)
    taken = read_manifest(tmp_path / "out" / search.CHOSEN / "model.xml").provenance
    assert [stage["kind"] for stage in taken.stages] == ["distill", "export"]
    assert len(asked_of) == 2


@pytest.mark.parametrize("option", ["--train-share=85", "--train-share=0", "--max-drop=inf", "--max-drop=nan"])
def test_numbers_that_make_no_sense_are_refused(
    birds_teacher: Path, two_birds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    asked = [
        "compress",
        birds_teacher,
        two_birds,
        "--to",
        "openvino",
        "--budget",
        "3ms",
        "--out",
        tmp_path / "out",
        option,
    ]
    monkeypatch.setattr(sys, "argv", ["edgefg", *map(str, asked)])
    monkeypatch.setattr(search, "compress", lambda *_, **__: pytest.fail("began"))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2


def test_on_the_command_line_a_budget_that_nothing_meets_ends_with_1(
    found: tuple[Path, Front], birds_teacher: Path, two_birds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    asked = [
        "compress", birds_teacher, two_birds, "--to", "openvino", "--budget", "1us", "--out", tmp_path / "out",
        "--student", "test_resnet=none", "--size", 32, "--macs", 1, "--precision", "fp32", "--workers", 0,
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["edgefg", *map(str, asked)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    printed = capsys.readouterr().out
    assert "no candidate keeps the budget" in printed
    assert "test_resnet-32 fp32" in printed
    assert (tmp_path / "out" / "front.png").read_bytes().startswith(b"\x89PNG")
    assert read_front(tmp_path / "out" / search.FRONT).chosen is None
