"""What the tests of a search share: a small one of two students."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from edgefg.export.search.candidates import Student, space_of
from edgefg.export.search.context import Training
from edgefg.export.search.search import Request
from edgefg.settings.hardware import Hardware
from edgefg.settings.pruning import PruningConfig
from edgefg.settings.quantization import QuantizationConfig
from edgefg.settings.training import Schedule, TrainingConfig

HERE = Hardware(accelerator="cpu", workers=0)
CONFIG = TrainingConfig(image_size=32, schedule=Schedule(epochs=2, batch_size=16))
STUDENTS = [Student(backbone="test_resnet", weights="none"), Student(backbone="test_efficientnet", weights="none")]


def request(**changed: Any) -> Request:
    asked = Request(
        target="openvino",
        budget_ms=1e4,
        max_drop=100.0,
        space=space_of(students=STUDENTS, sizes=[32], macs=[1.0, 0.8], precisions=["int8", "fp32"]),
        # In steps of 4 channels the narrow networks of the tests can be pruned so far.
        training=Training(
            config=CONFIG,
            short_epochs=1,
            prune_epochs=1,
            train_share=0.8,
            pruning=PruningConfig(round_to=4),
            quantization=QuantizationConfig(num_samples=8),
        ),
        trials=2,
        finalists=1,
    )
    return replace(asked, **changed)
