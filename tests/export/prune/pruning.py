"""What the tests of pruning share: small inputs, and gradients of a loss on noise."""

from __future__ import annotations

from collections.abc import Callable

import torch

from edgefg.preprocess import InputSpec
from edgefg.settings.training import Schedule, TrainingConfig
from edgefg.training.models.network import Batch, Network
from edgefg.training.objective import TeacherObjective

SIDE = 16
SPEC = InputSpec(height=SIDE, width=SIDE)


def gradients_of(spec: InputSpec = SPEC, classes: int = 3) -> Callable[[Network], None]:
    """Return what fills a network's gradients: cross entropy on the same noise every time."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 255, (8, spec.height, spec.width, 3), dtype=torch.uint8, generator=generator)

    def fill(network: Network) -> None:
        network.train()
        objective = TeacherObjective(
            TrainingConfig(image_size=spec.height, schedule=Schedule(epochs=1)), network, classes
        )
        objective(network, Batch(images, torch.arange(8) % classes))[0].backward()

    return fill
