"""One real search of two architectures, which most tests resume; and searches whose steps do nothing."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from edgefg import Classifier
from edgefg.artifact.hashes import sha256
from edgefg.artifact.manifest import read_manifest
from edgefg.errors import DataError, ExportError, TrainingError
from edgefg.evaluation.verify import VerifyReport
from edgefg.export.distill.distill import distill
from edgefg.export.search import artifacts, search, trials
from edgefg.export.search.candidates import Architecture, Candidate, ParetoFront, Stage, Variant, render
from edgefg.export.search.context import SearchContext
from edgefg.settings.gate import Gate
from edgefg.settings.options import with_options
from edgefg.settings.quantization import Precision, QuantizationConfig
from edgefg.settings.search import CandidateConfig
from tests.export.search.searching import CANDIDATES, HERE, PRUNED, RESNET, SEARCH, accuracy, candidate
from tests.synthetic import write_dataset

Compress = Callable[..., tuple[ParetoFront, VerifyReport | None]]
Found = tuple[Path, ParetoFront]


@pytest.fixture(scope="module")
def compress(birds_teacher: Path, two_birds: Path) -> Compress:
    """A search for OpenVINO in a folder, with the tests' settings where nothing else is given."""

    def compress(out: Path, data: Path = two_birds, **changed: Any) -> tuple[ParetoFront, VerifyReport | None]:
        given: dict[str, Any] = {
            "to": "openvino",
            "budget_ms": 1e4,
            "search": SEARCH,
            "candidates": CANDIDATES,
            "hardware": HERE,
        }
        return search.compress(birds_teacher, data, out, **(given | changed))

    return compress


class Counted:
    """Calls a function, counts how often, and is interrupted before the call of a given number."""

    def __init__(self, function: Callable[..., object], stop: int = -1) -> None:
        self.function, self.calls, self.stop = function, 0, stop

    def __call__(self, *args: object, **others: object) -> object:
        if self.calls == self.stop:
            raise KeyboardInterrupt
        self.calls += 1
        return self.function(*args, **others)


@pytest.fixture(scope="module")
def finished(compress: Compress, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """A search that was interrupted in its second distillation and resumed; not to be changed."""
    out = tmp_path_factory.mktemp("search") / "out"
    with pytest.MonkeyPatch.context() as patch:
        distil = Counted(distill, stop=1)
        patch.setattr(trials, "distill", distil)
        with pytest.raises(KeyboardInterrupt):
            compress(out)
        assert not (out / search.FRONT).exists()
        again, written = Counted(distil.function), Counted(trials._write_untrained)
        patch.setattr(trials, "distill", again)
        patch.setattr(trials, "_write_untrained", written)
        front, verified = compress(out)
    assert verified is not None
    assert verified.artifact == str(out / search.CHOSEN / "model.xml")
    assert (distil.calls, again.calls, written.calls) == (1, 2, 0)
    return out, front


@pytest.fixture
def found(finished: Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Found:
    """A copy of the finished search, which may be changed. Nothing is trained any more."""
    monkeypatch.setattr(trials, "distill", lambda *_, **__: pytest.fail("trained"))
    return shutil.copytree(finished[0], tmp_path / "found"), finished[1]


def read_front(out: Path) -> ParetoFront:
    return msgspec.json.decode((out / search.FRONT).read_bytes(), type=ParetoFront)


def test_every_candidate_is_measured_and_some_are_trained(finished: Found) -> None:
    out, front = finished
    stages = [one.stage for one in front.candidates]
    assert (stages.count("short"), stages.count("full")) == (2, 2)
    for one in front.candidates:
        assert 0 < one.latency_low_ms <= one.latency_ms <= one.latency_high_ms
        assert one.accuracy is not None
        assert one.machine
    assert read_front(out) == front
    assert not list(out.glob("untrained/**/model.xml"))
    assert len(list(out.glob("untrained/*/*.json"))) == 4


def test_the_chosen_artifact_is_complete_and_the_best_of_the_full_ones(finished: Found, birds_teacher: Path) -> None:
    out, front = finished
    full = [one for one in front.candidates if one.stage == "full"]
    chosen = next(one for one in full if one.name == front.chosen)
    assert chosen.accuracy is not None
    assert chosen.accuracy.top1 == max(one.accuracy.top1 for one in full if one.accuracy is not None)
    with Classifier(out / search.CHOSEN / "model.xml", verify=True) as classifier:
        assert classifier.manifest.provenance.teacher == sha256(birds_teacher)
        assert classifier.manifest.accuracy == chosen.accuracy
        assert classifier.manifest.precision == chosen.precision
    assert chosen.drop == pytest.approx(100 * (front.teacher.top1 - chosen.accuracy.top1))


def test_another_budget_uses_the_results(found: Found, compress: Compress, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "edgefg")
    out, front = found
    killed = out / "short" / ".int8.0a1b2c3d"  # left by kill -9
    killed.mkdir()
    none, verified = compress(out, budget_ms=1e-4)
    assert none.chosen is verified is None
    assert not killed.exists()
    assert not (out / search.CHOSEN).exists()
    assert {one.stage for one in none.candidates} == {"untrained"}
    assert "0 of 2 architectures keep 0.0001 ms, 0 are trained" in caplog.messages
    # Full trainings count even if this search would not select them.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "select_finalists", lambda *_: [])
        assert compress(out)[0] == front
    assert read_manifest(out / search.CHOSEN / "model.xml").accuracy is not None


def test_another_machine_measures_again_and_trains_nothing(
    found: Found, compress: Compress, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, front = found

    def slow(_: object, models: Iterable[Variant], **__: object) -> dict[Variant, tuple[float, float, float]]:
        return dict.fromkeys(models, (7.0, 8.0, 9.0))

    def write(context: SearchContext, architecture: Architecture, precisions: Iterable[Precision]) -> None:
        for precision in precisions:
            model = context.model((architecture, precision), "untrained")
            model.parent.mkdir()
            model.touch()

    monkeypatch.setattr(trials, "measure_latency", slow)
    monkeypatch.setattr(trials, "_write_untrained", write)
    monkeypatch.setattr(search, "_machine", lambda _: "another")
    other, _ = compress(out)
    assert {(other.machine, one.machine, one.latency_ms) for one in other.candidates} == {("another", "another", 8.0)}
    assert {(one.name, one.accuracy) for one in other.candidates} == {
        (one.name, one.accuracy) for one in front.candidates
    }


def test_a_candidate_that_fails_the_gate_is_shown_and_not_chosen(found: Found, compress: Compress) -> None:
    out, _ = found
    none, verified = compress(out, gate=Gate(max_drop=-100))
    assert none.chosen is verified is None
    assert not (out / search.CHOSEN).exists()
    assert all("top-1 drops by" in failure for one in none.candidates for failure in one.failures)
    told = render(none)
    assert "keeps the budget and --max-drop, but not the gate: top-1 drops by" in told
    assert f"gate: {none.candidates[0].name} ({none.candidates[0].stage}): top-1 drops by" in told


def test_a_full_disk_leaves_the_earlier_choice(
    found: Found, compress: Compress, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, front = found

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("edgefg.artifact.folder.shutil.copytree", fail)
    with pytest.raises(OSError, match="No space left"):
        compress(out)
    assert read_front(out) == front
    assert read_manifest(out / search.CHOSEN / "model.xml").accuracy is not None
    assert not list(out.glob(".chosen.*"))


def test_another_search_is_refused_and_nothing_lost(
    finished: Found, compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = finished
    before = sorted(out.rglob("*"))
    with pytest.raises(DataError, match=r"holds a search with another short_epochs. Use another --out"):
        compress(out, search=with_options(SEARCH, short_epochs=2))
    both = replace(CANDIDATES, training=with_options(CANDIDATES.training, lr=0.1), quantization=QuantizationConfig())
    with pytest.raises(DataError, match="holds a search with another lr and num_samples"):
        compress(out, candidates=both)
    with pytest.raises(DataError, match="is test_resnet=none with 1 of the MACs, not test_resnet=hub"):
        compress(out, search=with_options(SEARCH, student=("test_resnet",), macs=(1.0,)))
    assert sorted(out.rglob("*")) == before
    strange = write_dataset(tmp_path / "strange", classes=3, per_class=8, size=32, seed=5)
    with pytest.raises(DataError):
        compress(tmp_path / "out", strange)
    assert not (tmp_path / "out").exists()


def test_folders_that_are_not_a_search_of_this_version_are_refused(
    finished: Found, compress: Compress, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="is not empty and does not hold a search"):
        compress(tmp_path / "full")
    identity = msgspec.json.decode((finished[0] / "compress.json").read_bytes())
    earlier = ({"teacher": "a" * 64, "training": {}}, {**identity, "version": search._VERSION - 1})
    for number, old in enumerate(earlier):
        out = tmp_path / str(number)
        out.mkdir()
        (out / "compress.json").write_bytes(msgspec.json.encode(old))
        with pytest.raises(DataError, match=f"{out} holds a search of another version of edgefg. Use another --out"):
            compress(out)


def test_a_setting_that_was_added_later_has_its_default(found: Found, compress: Compress) -> None:
    out, front = found
    identity = msgspec.json.decode((out / "compress.json").read_bytes())
    del identity["candidates"]["training"]["schedule"]["clip_norm"]
    (out / "compress.json").write_bytes(msgspec.json.encode(identity))
    assert compress(out)[0] == front


class StopError(Exception):
    """The search begins."""


@pytest.fixture
def claimed(compress: Compress, monkeypatch: pytest.MonkeyPatch) -> Callable[..., CandidateConfig]:
    """Start a search and stop before its first step. Returns how its folder says that candidates are made."""

    def stop(*_: object) -> None:
        raise StopError

    def start(out: Path, **changed: Any) -> CandidateConfig:
        monkeypatch.setattr(search, "_teacher_accuracy", stop)
        with pytest.raises(StopError):
            compress(out, **changed)
        return search._read_identity(out).candidates

    return start


@pytest.mark.parametrize("saturates", [True, False])
def test_the_first_search_in_a_folder_decides_the_width_of_weights(
    claimed: Callable[..., CandidateConfig], compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, saturates: bool,
) -> None:  # fmt: skip
    caplog.set_level("INFO", "edgefg")
    monkeypatch.setattr("edgefg.export.targets.target.lacks_vnni", lambda: saturates)
    first = claimed(tmp_path / "out")
    assert first.quantization == QuantizationConfig(num_samples=8, reduce_range=saturates)
    assert ("weights take 7 bits" in caplog.text) == saturates
    monkeypatch.setattr("edgefg.export.targets.target.lacks_vnni", lambda: not saturates)
    assert claimed(tmp_path / "out") == first
    other = replace(CANDIDATES, quantization=replace(first.quantization, reduce_range=not saturates))
    with pytest.raises(DataError, match="holds a search with another reduce_range"):
        compress(tmp_path / "out", candidates=other)
    fp32 = with_options(SEARCH, precision=("fp32",))
    assert claimed(tmp_path / "fp32", search=fp32).quantization.reduce_range == (not saturates)


@pytest.mark.parametrize(
    ("changed", "quantization", "complaint"),
    [
        ({"precision": ("fp32",)}, {"calibrator": "mse"}, "--calibrator applies only to --precision int8"),
        ({"precision": ("fp32",)}, {"reduce_range": True}, "--reduce-range applies only to --precision int8"),
        ({"precision": ("fp32",), "qat_epochs": 1}, {}, "--qat-epochs applies only to --precision int8"),
        ({}, {"max_int8_drop": -1.0}, "--max-int8-drop -1.0 is out of range"),
        ({}, {"max_int8_drop": float("nan")}, "--max-int8-drop nan is out of range"),
        ({"qat_epochs": 1}, {"max_int8_drop": 1.0}, "--max-int8-drop and --qat-epochs serve the same purpose"),
    ],
)
def test_contradicting_options_are_refused_before_anything_is_written(
    compress: Compress, tmp_path: Path, changed: dict[str, Any], quantization: dict[str, Any], complaint: str
) -> None:
    candidates = replace(CANDIDATES, quantization=QuantizationConfig(**quantization))
    with pytest.raises(DataError, match=complaint):
        compress(tmp_path / "out", search=with_options(SEARCH, **changed), candidates=candidates)
    assert not (tmp_path / "out").exists()


def test_values_out_of_range_and_targets_of_other_machines_are_refused(compress: Compress, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--size \(8,\) is out of range"):
        compress(tmp_path / "out", search=replace(SEARCH, sizes=(8,)))
    with pytest.raises(DataError, match="--to tensorrt-onnx cannot be measured on this machine"):
        compress(tmp_path / "out", to="tensorrt-onnx")
    assert not (tmp_path / "out").exists()


Trials = list[tuple[str, str]]


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> Trials:
    """The trials of a search whose networks take 2 ms and are right nine times of ten."""
    tried: Trials = []

    def untrained(_: object, architectures: Iterable[Architecture], precisions: Iterable[Precision]) -> list[Candidate]:
        given = [(architecture, precision) for architecture in architectures for precision in precisions]
        return [candidate(32, 2.0, architecture=one, precision=precision) for one, precision in given]

    def trial(_: object, one: Architecture, stage: Stage, precisions: Iterable[Precision]) -> list[Candidate]:
        tried.append((one.name, stage))
        return [candidate(32, 2.0, 0.9, architecture=one, precision=precision, stage=stage) for precision in precisions]

    monkeypatch.setattr(search, "measure_untrained", untrained)
    monkeypatch.setattr(search, "run_trial", trial)
    return tried


def run(context: SearchContext, *architectures: Architecture) -> ParetoFront:
    return search._run(context, architectures, 3.0)


def test_a_short_distillation_selects_the_finalists(context: SearchContext, tried: Trials) -> None:
    front = run(context, RESNET, PRUNED)
    assert tried == [(RESNET.name, "short"), (PRUNED.name, "short"), (RESNET.name, "full")]
    assert {(one.architecture.name, one.stage) for one in front.candidates} == {
        (PRUNED.name, "short"),
        (RESNET.name, "full"),
    }
    assert front.chosen == "test_resnet-32 int8"
    assert (front.max_drop, front.teacher, front.machine) == (100.0, accuracy(0.9), "here")


def test_no_short_distillation_if_all_can_be_finalists(context: SearchContext, tried: Trials) -> None:
    run(replace(context, search=with_options(context.search, finalists=2)), RESNET, PRUNED)
    assert tried == [(RESNET.name, "full"), (PRUNED.name, "full")]


def test_a_failed_trial_is_skipped_at_once(
    context: SearchContext, tried: Trials, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trial: Any = vars(search)["run_trial"]  # that of the fixture

    def failing(
        context: SearchContext, one: Architecture, stage: Stage, precisions: list[Precision]
    ) -> list[Candidate]:
        if one == RESNET:
            raise TrainingError("the loss is not finite")
        return trial(context, one, stage, precisions)

    monkeypatch.setattr(search, "run_trial", failing)
    front = run(context, RESNET, PRUNED)
    assert front.chosen == "test_resnet-32-macs80 int8"
    assert front.skipped == ("test_resnet-32 (short): the loss is not finite",)
    assert caplog.messages == [f"skipped: {line}" for line in front.skipped]
    # Not if all fail.
    with pytest.raises(TrainingError, match="not finite"):
        run(context, RESNET)


def test_a_search_without_any_candidate_is_an_error(
    context: SearchContext, tried: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(context: SearchContext, *_: object) -> list[Candidate]:
        context.skip("test_resnet-32 fp32", ExportError("cannot be exported"))
        return []

    monkeypatch.setattr(search, "measure_untrained", nothing)
    with pytest.raises(ExportError, match="none of the candidates can be exported: test_resnet-32 fp32: cannot be"):
        run(context, RESNET)


def test_latencies_near_the_budget_are_warned_of(
    context: SearchContext, tried: Trials, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    close = candidate(32, 3.1, architecture=replace(RESNET, size=48))
    slower = [candidate(32, 3.5, 0.9, architecture=RESNET, stage="short")]
    fast = [candidate(32, 2.0, architecture=one) for one in (RESNET, PRUNED)]
    monkeypatch.setattr(search, "measure_untrained", lambda *_: [*fast, close])
    monkeypatch.setattr(search, "run_trial", lambda _, one, *__: slower if one == RESNET else [])
    run(context, RESNET, PRUNED)
    assert caplog.messages == [
        "just over the budget: test_resnet-48 int8. If the machine was busy, use --measure-again",
        "test_resnet-32 int8 takes 3.50 ms now that it is trained, more than the budget",
    ]


@pytest.mark.slow
def test_a_search_for_onnx_runtime(compress: Compress, tmp_path: Path) -> None:
    front, _ = compress(tmp_path / "out", to="onnx", search=with_options(SEARCH, macs=(1.0,)))
    with Classifier(tmp_path / "out" / search.CHOSEN / "model.onnx", verify=True) as classifier:
        assert classifier.runtime_version.startswith("onnxruntime")
    assert front.chosen is not None


@pytest.mark.slow
def test_an_int8_finalist_may_be_trained_in_int8(
    compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_: object, model: Path) -> tuple[str, ...]:
        return ("a class loses more",) if model.parent.name == artifacts._CALIBRATED else ()

    monkeypatch.setattr(artifacts, "failures", refused)
    asked = with_options(SEARCH, macs=(1.0,), precision=("int8",), qat_epochs=1)
    _, verified = compress(tmp_path / "out", search=asked)
    assert verified is not None
    made = read_manifest(tmp_path / "out" / search.CHOSEN / "model.xml").provenance
    assert made.parent == sha256(tmp_path / "out" / "full" / RESNET.name / "qat" / "qat.safetensors")
    assert [stage["kind"] for stage in made.stages] == ["distill", "qat", "export"]
    # Another gate, which only the other one keeps, takes the other one.
    monkeypatch.setattr(artifacts, "failures", lambda *args: () if refused(*args) else ("a class loses more",))
    compress(tmp_path / "out", search=asked)
    taken = read_manifest(tmp_path / "out" / search.CHOSEN / "model.xml").provenance
    assert [stage["kind"] for stage in taken.stages] == ["distill", "export"]
