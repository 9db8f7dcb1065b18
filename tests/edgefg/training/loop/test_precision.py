"""Mixed precision: which one a GPU gets, and a scaled loss whose gradients overflow. No GPU needed: CPUs have both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision

from edgefg.errors import TrainingError
from edgefg.settings.hardware import Hardware
from edgefg.settings.options import with_options
from edgefg.settings.training import TrainingConfig
from edgefg.training.loop import fit as loop
from edgefg.training.models.network import Batch, Criterion, Network, Step
from edgefg.training.teacher import train_teacher
from tests.synthetic import write_dataset


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("few"), classes=3, per_class=12, size=40, seed=1)


def run(few: Path, out: Path, config: TrainingConfig, hardware: Hardware) -> Path:
    return train_teacher(few, out, config, backbone="test_efficientnet", weights="none", hardware=hardware)


def scaled_by(monkeypatch: pytest.MonkeyPatch, scale: float) -> list[torch.amp.GradScaler]:
    """Let the loop run in float16 on the CPU, its loss scaled at first by ``scale``; returns the runs' scalers."""
    scalers: list[torch.amp.GradScaler] = []

    def launch(hardware: Hardware) -> Fabric:
        scalers.append(torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10_000))
        return Fabric(accelerator="cpu", devices=1, plugins=MixedPrecision("16-mixed", "cpu", scalers[-1]))

    monkeypatch.setattr(loop, "_launch", launch)
    return scalers


@pytest.mark.parametrize(
    ("native", "wanted"), [(True, "bf16-mixed"), (False, "16-mixed")], ids=["Ampere and later", "T4, V100"]
)
def test_a_gpu_that_only_emulates_bfloat16_gets_float16(
    monkeypatch: pytest.MonkeyPatch, native: bool, wanted: str
) -> None:
    chosen: list[str] = []

    class Seen:
        def __init__(self, *, precision: str, **options: Any) -> None:
            chosen.append(precision)

        def launch(self) -> None:
            """Nothing to start."""

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    monkeypatch.setattr(loop, "Fabric", Seen)
    loop._launch(Hardware())
    assert chosen == [wanted]


def test_the_loss_of_a_method_is_computed_in_the_chosen_precision(
    few: Path, tmp_path: Path, config: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds: set[torch.dtype] = set()
    loss = Network.loss

    def seen(self: Network, batch: Batch, criterion: Criterion) -> Step:
        step = loss(self, batch, criterion)
        kinds.add(step.logits.dtype)
        return step

    monkeypatch.setattr(Network, "loss", seen)
    run(few, tmp_path, config, Hardware(accelerator="cpu", workers=0, precision="bf16-mixed"))
    assert kinds == {torch.bfloat16}


def test_steps_whose_scaled_gradients_overflow_are_skipped_and_training_goes_on(
    few: Path, tmp_path: Path, config: TrainingConfig, hardware: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    scalers = scaled_by(monkeypatch, 2.0**22)
    run(few, tmp_path, with_options(config, batch_size=8), hardware)
    # Halved at least once, and since then some steps were taken.
    assert 1 < scalers[0].get_scale() < 2.0**22


def test_gradients_that_overflow_without_a_scale_stop_the_run(
    few: Path, tmp_path: Path, config: TrainingConfig, hardware: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled_by(monkeypatch, 1.0)

    def spoil(self: loop._Loop) -> None:
        for parameter in self.network.parameters():
            parameter.grad = torch.full_like(parameter, torch.inf)

    monkeypatch.setattr(loop._Loop, "share_gradients", spoil)
    with pytest.raises(TrainingError, match="gradients is not finite at epoch 1, step 2"):
        run(few, tmp_path, with_options(config, batch_size=8), hardware)


def test_the_scale_is_resumed(
    few: Path, tmp_path: Path, config: TrainingConfig, hardware: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_options(config, batch_size=8)
    scalers = scaled_by(monkeypatch, 2.0**22)
    whole = run(few, tmp_path / "whole", config, hardware)
    epoch = loop._Loop.epoch

    def killed(self: loop._Loop, training: Any, progress: Any, *args: Any) -> float:
        if progress.epochs_done == 1:
            raise KeyboardInterrupt
        return epoch(self, training, progress, *args)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "epoch", killed)
        with pytest.raises(KeyboardInterrupt):
            run(few, tmp_path / "cut", config, hardware)
    assert run(few, tmp_path / "cut", config, hardware).read_bytes() == whole.read_bytes()
    assert scalers[2].state_dict() == scalers[0].state_dict()
    assert 1 < scalers[0].get_scale() < 2.0**22
