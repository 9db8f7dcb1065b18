"""`edgefg distill`, `prune`, `qat` and `compress`: the arguments that reach the library."""

from __future__ import annotations

import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgefg.artifact.manifest import Accuracy
from edgefg.cli.compress import compress
from edgefg.export.search.candidates import ParetoFront
from edgefg.export.targets import TARGETS
from edgefg.settings.distillation import DistillationConfig
from edgefg.settings.export import ExportConfig
from edgefg.settings.gate import Gate
from edgefg.settings.hardware import Hardware
from edgefg.settings.pruning import PruningConfig
from edgefg.settings.search import CandidateConfig, SearchConfig, TrialSchedule
from edgefg.settings.training import Augmentation, FineTuning, Schedule, TrainingConfig
from tests.conftest import Run

Call = Callable[[str, str], tuple[tuple[Any, ...], dict[str, Any]]]


@pytest.fixture
def call(run: Run, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Run a command whose library function does nothing; returns what it was called with."""

    def call(function: str, line: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        seen: list[Any] = []
        monkeypatch.setattr(function, lambda *args, **options: seen.extend((args, options)))
        status, _, err = run(*line.split())
        assert (status, err) == (0, "")
        args, options = seen
        return args, options

    return call


def test_distill(call: Call) -> None:
    line = "distill t d --out o --image-size 128 --loss dkd --ema 0.99 --layer-decay 0.7"
    line += " --extra-teacher t2 --extra-teacher t3 --unlabelled wild"
    args, options = call("edgefg.export.distill.distill.distill", line)
    assert args[-1] == TrainingConfig(
        image_size=128,
        schedule=Schedule(ema=0.99),
        augmentation=Augmentation(),
        fine_tuning=FineTuning(layer_decay=0.7),
    )
    assert options["distillation"] == DistillationConfig(loss="dkd")
    assert [str(path) for path in options["extra_teachers"]] == ["t2", "t3"]
    assert str(options["unlabelled"]) == "wild"


def test_prune_and_qat_have_short_schedules(call: Call) -> None:
    args, _ = call("edgefg.export.prune.prune.prune", "prune s d --out o --uniform --mix cutmix")
    assert args[-2:] == (
        TrainingConfig(schedule=Schedule(epochs=5, lr=5e-4), augmentation=Augmentation(mix="cutmix")),
        PruningConfig(uniform=True),
    )
    args, options = call("edgefg.export.qat.qat.qat", "qat s d --to onnx --out o --lr 1e-5")
    assert args[-1] == TrainingConfig(schedule=Schedule(epochs=3, lr=1e-5))
    assert options["to"] == "onnx"


COMPRESS = "compress t d --to onnx --budget 2.5ms"


def test_compress(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    class StopError(Exception):
        pass

    def search(*paths: Path, **options: Any) -> None:
        seen.update(options)
        raise StopError

    monkeypatch.setattr("edgefg.export.search.search.compress", search)
    line = (
        f"{COMPRESS} --out o --size 96 --size 64 --macs 0.5 --precision fp32 --max-drop 2 --student a --student b=none"
    )
    line += " --qat-epochs 2 --train-share 0.8 --measure-again --max-flips 3 --devices 2 --lr 0.01 --generated-golden"
    with pytest.raises(StopError):
        run(*line.split())
    assert seen == {
        "to": "onnx",
        "budget_ms": 2.5,
        "search": SearchConfig(
            max_drop=2.0,
            students=("a", "b=none"),
            sizes=(96, 64),
            macs=(0.5,),
            precisions=("fp32",),
            measure_again=True,
            schedule=TrialSchedule(qat_epochs=2, train_share=0.8),
        ),
        "candidates": CandidateConfig(
            training=TrainingConfig(
                schedule=Schedule(epochs=30, lr=0.01),
                augmentation=Augmentation(min_area=0.2, randaugment=9, color=0.0),
            ),
            export=ExportConfig(generated_golden=True),
        ),
        "gate": Gate(max_drop=100, max_flips=3),
        "device": None,
        "hardware": Hardware(devices=2),
        "skip_corrupt": False,
    }


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("--val-every 2", "Unknown option: --val-every."),
        ("--train-share 85", "--train-share 85.0 is out of range: Expected `float` <= 1.0"),
        ("--train-share 0", "--train-share 0.0 is out of range"),
        ("--max-drop inf", "--max-drop inf is out of range"),
        ("--max-drop nan", "--max-drop nan is out of range"),
        ("--size 8", "--size (8,) is out of range: Expected `int` >= 16"),
    ],
)
def test_compress_refuses(run: Run, monkeypatch: pytest.MonkeyPatch, options: str, complaint: str) -> None:
    monkeypatch.setattr("edgefg.export.search.search.compress", lambda *_, **__: pytest.fail("began"))
    status, _, err = run(*COMPRESS.split(), "--out", "o", *options.split())
    assert (status, err.startswith(f"edgefg: {complaint}")) == (2, True), err


def test_compress_ends_with_1_if_no_candidate_is_feasible(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    teacher = Accuracy(data="val", images=100, top1=0.9, top1_low=0.8, top1_high=1, balanced=0.9)
    front = ParetoFront(
        target="onnx", device="CPU", budget_ms=2.5, max_drop=1, teacher=teacher, candidates=(), pareto=()
    )
    monkeypatch.setattr("edgefg.export.search.search.compress", lambda *_, **__: (front, None))
    status, printed, _ = run(*COMPRESS.split(), "--out", tmp_path)
    assert status == 1
    assert "no candidate was measured" in printed
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    status, printed, _ = run(*COMPRESS.split(), "--out", tmp_path, "--json")
    assert (status, msgspec.json.decode(printed, type=ParetoFront)) == (1, front)


def test_compress_offers_the_targets_that_run_on_a_workstation() -> None:
    hint = typing.get_type_hints(compress)["to"]
    assert typing.get_args(hint) == tuple(name for name, target in TARGETS.items() if target.engine is not None)
