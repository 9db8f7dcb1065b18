"""`edgefg distill`, `prune`, `qat` and `compress`: the arguments that reach the library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from edgefg.settings.distillation import DistillationConfig
from edgefg.settings.gate import Gate
from edgefg.settings.hardware import Hardware
from edgefg.settings.pruning import PruningConfig
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


def test_compress_keeps_what_it_does_not_offer(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    class StopError(Exception):
        pass

    def search(teacher: object, data: object, out: object, request: Any, **options: Any) -> None:
        seen.update(request=request, **options)
        raise StopError

    monkeypatch.setattr("edgefg.export.search.search.compress", search)
    line = "compress t d --to onnx --budget 2.5ms --out o --size 96 --size 64 --macs 0.5 --precision fp32 --max-drop 2"
    with pytest.raises(StopError):
        run(*line.split(), "--max-flips", 3, "--devices", 2, "--student", "a", "--student", "b=none", "--lr", 0.01)
    request = seen["request"]
    assert (request.budget_ms, request.max_drop) == (2.5, 2.0)
    assert request.gate == Gate(max_drop=100, max_flips=3)
    assert seen["hardware"] == Hardware(devices=2)
    assert request.training.pruning == PruningConfig()
    assert request.training.config.schedule == Schedule(epochs=30, lr=0.01)
    assert request.training.config.augmentation == Augmentation(min_area=0.2, randaugment=9, color=0.0)
    status, _, err = run(*line.split(), "--val-every", 2)
    assert (status, err.startswith("edgefg: Unknown option: --val-every.")) == (2, True)
