from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from edgefg.artifact.stages import StartingWeights, TrainStage
from edgefg.data import load_dataset
from edgefg.errors import DataError
from edgefg.settings.hardware import Hardware
from edgefg.settings.training import FineTuning, Schedule, TrainingConfig
from edgefg.training.checkpoint import read_header
from edgefg.training.teacher import train_teacher


def run(birds: Path, out: Path, config: TrainingConfig, hardware: Hardware, **options: Any) -> Path:
    return train_teacher(birds, out, config, backbone="test_efficientnet", weights="none", hardware=hardware, **options)


def test_a_teacher_learns_and_leaves_a_checkpoint_and_logs(birds: Path, tmp_path: Path, hardware: Hardware) -> None:
    config = TrainingConfig(
        image_size=48, schedule=Schedule(epochs=12, batch_size=16, lr=4e-3), fine_tuning=FineTuning(head_lr_ratio=1.0)
    )
    path = run(birds, tmp_path, config, hardware)
    assert path == tmp_path / "teacher.safetensors"
    header = read_header(path)
    assert header.labels == tuple(sorted(entry.name for entry in (birds / "train").iterdir()))
    assert header.dataset == load_dataset(birds).fingerprint
    assert header.validation is not None
    rows = list(csv.DictReader((tmp_path / "teacher.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == [str(n + 1) for n in range(12)]
    assert float(rows[-1]["loss"]) < 0.9 * float(rows[0]["loss"])
    assert float(rows[-1]["top1"]) == pytest.approx(header.validation.top1, abs=1e-5)
    assert list((tmp_path / "tensorboard" / "teacher").iterdir())
    assert not (tmp_path / "teacher.resume.safetensors").exists()


def test_the_header_records_what_was_done(
    birds: Path, tmp_path: Path, config: TrainingConfig, hardware: Hardware
) -> None:
    header = read_header(run(birds, tmp_path, config, hardware, method="bcnn", options={"projection": 8}))
    (stage,) = header.stages
    assert isinstance(stage, TrainStage)
    assert (stage.method, stage.backbone, stage.weights) == (
        "bcnn",
        "test_efficientnet",
        StartingWeights(source="none"),
    )
    assert stage.options == header.options
    assert header.options["projection"] == 8
    assert stage.training == header.training == config
    assert list(stage.versions) == ["edgefg", "torch", "timm"]


def test_unknown_methods_end_before_the_data_are_read(
    tmp_path: Path, config: TrainingConfig, hardware: Hardware
) -> None:
    with pytest.raises(DataError, match="there is no method 'cnn'"):
        run(tmp_path / "nowhere", tmp_path, config, hardware, method="cnn")
