"""Small real data and a small real network for the training tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgefg.settings.hardware import Hardware
from edgefg.settings.training import Schedule, TrainingConfig
from tests.synthetic import write_dataset


@pytest.fixture(scope="session")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three look-alike classes with split folders."""
    return write_dataset(tmp_path_factory.mktemp("birds"), classes=3, per_class=30, size=64, seed=1)


@pytest.fixture
def config() -> TrainingConfig:
    """Two quick epochs at 32 px."""
    return TrainingConfig(image_size=32, schedule=Schedule(epochs=2, batch_size=16, seed=3))


@pytest.fixture
def hardware() -> Hardware:
    """This process, no workers."""
    return Hardware(accelerator="cpu", workers=0)
