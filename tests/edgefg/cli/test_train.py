"""`edgefg train` and `edgefg methods`: the arguments that reach the library."""

from __future__ import annotations

import json
from typing import Any

import pytest

from edgefg.settings.hardware import Hardware
from edgefg.settings.split import SplitSpec
from edgefg.settings.training import Augmentation, FineTuning, MetricLearning, Schedule, TrainingConfig
from tests.conftest import Run


def test_options_of_all_groups_reach_the_training(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def train_teacher(data: object, out: object, config: TrainingConfig, **options: Any) -> str:
        seen.update(config=config, **options)
        return "teacher.safetensors"

    monkeypatch.setattr("edgefg.training.teacher.train_teacher", train_teacher)
    line = "train d --out o --image-size 96 --epochs 3 --flip none --freeze-epochs 1 --sampler pk --devices 2"
    line += " --method bcnn -o pooling=compact --option maps=8 --group (\\d+)_ --split-seed 7 --no-such"
    status, _, err = run(*line.split())
    assert (status, err) == (2, "edgefg: Unknown option: --no-such. See edgefg train --help\n")
    assert run(*line.split()[:-1]) == (0, "teacher.safetensors\n", "")
    assert seen["config"] == TrainingConfig(
        image_size=96,
        schedule=Schedule(epochs=3),
        augmentation=Augmentation(flip="none"),
        fine_tuning=FineTuning(freeze_epochs=1),
        metric_learning=MetricLearning(sampler="pk"),
    )
    assert seen["options"] == {"pooling": "compact", "maps": "8"}
    assert (seen["hardware"], seen["split"]) == (Hardware(devices=2), SplitSpec(seed=7, group=r"(\d+)_"))
    assert (seen["skip_corrupt"], seen["restart"]) == (False, False)


def test_an_option_of_a_method_is_name_and_value(run: Run) -> None:
    status, _, err = run("train", "d", "--out", "o", "-o", "maps")
    assert (status, err) == (2, "edgefg: --option 'maps' is not NAME=VALUE, for instance maps=32\n")


def test_methods(run: Run) -> None:
    status, out, err = run("methods", "--json")
    assert (status, err) == (0, "")
    assert {"plain", "bcnn", "cbam"} <= json.loads(out).keys()
    assert json.loads(run("methods", "--method", "bcnn", "--json")[1]).keys() == {"bcnn"}
    assert "bcnn" in run("methods")[1]
    assert run("methods", "--method", "magic")[0] == 2
