"""A run whose numbers are no longer finite stops with the step, the files and the last good state; others pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from edgefg.errors import TrainingError
from edgefg.settings.hardware import Hardware
from edgefg.settings.options import with_options
from edgefg.settings.training import TrainingConfig
from edgefg.training.loop import fit as loop
from edgefg.training.loop.finite import layers_stay_finite
from edgefg.training.losses import cross_entropy
from edgefg.training.methods import METHODS, build
from edgefg.training.models.backbone import IMAGENET_MEAN, IMAGENET_STD, build_backbone
from edgefg.training.models.network import Batch, Network
from edgefg.training.models.wsdan import WSDAN
from edgefg.training.teacher import train_teacher
from tests.synthetic import write_dataset

OPTIONS: dict[str, dict[str, object]] = {
    "wsdan": {"maps": 4},
    "racnn": {"peak_share": 0, "rank_share": 0},
    "bcnn": {"projection": 8},
    "partrcnn": {"width": 8, "proposals": 10, "region_size": 0.5},
}

LOST = "the loss is|the norm of the gradients is not finite|a layer's output"
GOOD = r"No epoch was finished|teacher\.resume\.safetensors holds the run after epoch"


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("few"), classes=3, per_class=12, size=48, seed=1)


def run(few: Path, out: Path, hardware: Hardware, method: str = "plain", **changes: Any) -> Path:
    config = with_options(TrainingConfig(), **{"epochs": 3, "image_size": 64, "batch_size": 8, "warmup": 0.0} | changes)
    options = OPTIONS.get(method, {})
    return train_teacher(
        few, out, config, method=method, backbone="resnet10t", weights="none", options=options, hardware=hardware
    )


@pytest.mark.parametrize(("method", "lr"), [*((method, 1e30) for method in METHODS), ("wsdan", 1e4), ("se", 1e4)])
def test_a_rate_that_is_far_too_high_stops_in_one_line(
    few: Path, tmp_path: Path, hardware: Hardware, method: str, lr: float
) -> None:
    with pytest.raises(TrainingError, match=rf"^({LOST}).*({GOOD}).* lower --lr") as found:
        run(few, tmp_path, hardware, method, lr=lr)
    assert "\n" not in str(found.value)


def test_gradients_that_are_not_finite_stop_with_the_batch(
    few: Path, tmp_path: Path, hardware: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = Network.loss

    def with_an_infinite_slope(self: Network, batch: Batch, criterion: Any) -> object:
        step = loss(self, batch, criterion)
        # √0 is 0, and its slope infinite.
        return step._replace(loss=step.loss + (step.logits - step.logits.detach()).square().sum().sqrt())

    monkeypatch.setattr(Network, "loss", with_an_infinite_slope)
    with pytest.raises(
        TrainingError, match=r"the norm of the gradients is not finite at epoch 1, step 1, in the batch .*\.jpg"
    ):
        run(few, tmp_path, hardware)


def test_logits_that_are_not_finite_name_the_epoch_and_the_last_good_state(
    few: Path, tmp_path: Path, hardware: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    epoch = loop._Loop.epoch

    def spoiling(self: loop._Loop, training: Any, progress: Any, *args: Any) -> float:
        mean = epoch(self, training, progress, *args)
        if progress.epochs_done == 1:
            with torch.no_grad():
                next(self.network.parameters()).fill_(torch.nan)
        return mean

    monkeypatch.setattr(loop._Loop, "epoch", spoiling)
    with pytest.raises(TrainingError, match=r"on val is not finite after epoch 2 .*holds the run after epoch 1"):
        run(few, tmp_path, hardware)


@pytest.mark.parametrize("place", ["_Loop.share_gradients", "metrics.score"])
def test_another_error_passes_as_it_is(
    few: Path, tmp_path: Path, hardware: Hardware, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def failing(*args: Any, **options: Any) -> None:
        raise RuntimeError("of its own")

    monkeypatch.setattr(f"edgefg.training.loop.fit.{place}", failing)
    with pytest.raises(RuntimeError, match="of its own"):
        run(few, tmp_path, hardware)


def test_maps_that_are_not_finite_reach_the_loss_of_wsdan() -> None:
    network = build("wsdan", build_backbone("resnet10t", 3), IMAGENET_MEAN, IMAGENET_STD, {"maps": 4})
    assert isinstance(network, WSDAN)
    nn.init.constant_(network.attend.get_parameter("0.weight"), torch.nan)
    step = network.loss(Batch(torch.zeros(2, 64, 64, 3, dtype=torch.uint8), torch.tensor([0, 1])), cross_entropy(0.0))
    assert step.loss.isnan()


def test_layers_are_watched_and_the_watch_ends() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert layers_stay_finite(network, lambda: network(torch.ones(1, 2)))
    assert not layers_stay_finite(network, lambda: network(torch.full((1, 2), torch.inf)))
    assert layers_stay_finite(network, lambda: 1 / 0)
    assert not any(module._forward_hooks for module in network.modules())
