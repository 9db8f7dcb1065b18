"""A training run short enough for a test, of any method."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from edgefg.settings.hardware import Hardware
from edgefg.settings.training import Schedule, TrainingConfig
from edgefg.training.teacher import train_teacher


def losses_of(data: Path, out: Path, method: str, **options: Any) -> list[float]:
    """Train ``method`` over an untrained ResNet-10 for five epochs at 32 px and return each epoch's loss."""
    config = TrainingConfig(
        image_size=32, schedule=Schedule(epochs=5, batch_size=18, lr=2e-3, label_smoothing=0.0, seed=3)
    )
    hardware = Hardware(accelerator="cpu", workers=0)
    train_teacher(
        data, out, config, backbone="resnet10t", method=method, options=options, weights="none", hardware=hardware
    )
    with (out / "teacher.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]
