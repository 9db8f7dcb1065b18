"""The loop with each ingredient: a resumed run equals an uninterrupted one, and each does what it promises."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from msgspec.structs import replace
from torch import nn

from edgefg import metrics
from edgefg.artifact.stages import StartingWeights, TrainStage
from edgefg.data import ImageDataset, load_dataset
from edgefg.errors import TrainingError
from edgefg.metrics import Scores
from edgefg.preprocess import InputSpec
from edgefg.settings.hardware import Hardware
from edgefg.settings.options import with_options
from edgefg.settings.split import SplitSpec
from edgefg.settings.training import Schedule, TrainingConfig
from edgefg.training.checkpoint import SCHEMA, Header, load
from edgefg.training.loop import fit as loop
from edgefg.training.loop.fit import fit
from edgefg.training.loop.resume import RunProgress
from edgefg.training.models.network import Batch, TrainableNetwork
from edgefg.training.models.racnn import Phase, RACNNOptions, phase_of
from edgefg.training.objective import Objective
from edgefg.training.teacher import train_teacher
from tests.synthetic import write_dataset

INGREDIENTS: dict[str, dict[str, object]] = {
    "ema": {"ema": 0.9},
    "patience": {"patience": 3},
    "freeze": {"freeze_epochs": 2},
    "unfreeze": {"unfreeze_epochs": 2},
    "sgd": {"optimizer": "sgd", "lr": 0.05},
    "layer decay": {"layer_decay": 0.7},
    "mixup": {"mix": "mixup", "mix_share": 0.5},
    "cutmix": {"mix": "cutmix"},
    "snapmix": {"mix": "snapmix", "mix_alpha": 5.0},
    "center": {"center_weight": 0.01},
    "triplet": {"triplet_weight": 1.0, "sampler": "pk", "mining": "semihard"},
    "balanced": {"sampler": "balanced"},
    "all": {"ema": 0.9, "patience": 3, "freeze_epochs": 1, "optimizer": "sgd", "mix": "cutmix", "val_every": 2},
}

PROPOSALS_FIRST = ["--method", "racnn", "-o", "size2=1", "-o", "size3=1", "-o", "warm_share=0"]


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("few"), classes=3, per_class=15, size=40, seed=1)


@pytest.fixture
def config() -> TrainingConfig:
    return TrainingConfig(image_size=32, schedule=Schedule(epochs=3, batch_size=8, seed=3))


def run(data: Path, out: Path, config: TrainingConfig, hardware: Hardware) -> Path:
    return train_teacher(data, out, config, backbone="test_efficientnet", weights="none", hardware=hardware)


def cut_off(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Kill the run in the epoch after ``after`` of them."""
    epoch = loop._Loop.epoch

    def killed(self: Any, training: Any, progress: RunProgress, *args: Any) -> float:
        if progress.epochs_done == after:
            epoch(self, training, progress, *args)  # what this epoch did must not count
            raise KeyboardInterrupt
        return epoch(self, training, progress, *args)

    monkeypatch.setattr(loop._Loop, "epoch", killed)


def rows(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "teacher.csv").read_text().splitlines()))


@pytest.mark.parametrize("name", INGREDIENTS)
def test_a_resumed_run_equals_an_uninterrupted_one(
    name: str, few: Path, tmp_path: Path, config: TrainingConfig, hardware: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_options(config, **INGREDIENTS[name])
    whole = run(few, tmp_path / "whole", config, hardware)
    cut_off(monkeypatch, after=1)
    with pytest.raises(KeyboardInterrupt):
        run(few, tmp_path / "cut", config, hardware)
    monkeypatch.undo()
    resumed = run(few, tmp_path / "cut", config, hardware)
    assert resumed.read_bytes() == whole.read_bytes()
    assert [row["loss"] for row in rows(tmp_path / "cut")] == [row["loss"] for row in rows(tmp_path / "whole")]


class Spy(Objective):
    """An objective that keeps the network's weights after each step but the last."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[dict[str, torch.Tensor]] = []

    def forward(self, network: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        self.weights.append({name: value.clone() for name, value in network.state_dict().items()})
        logits = network(batch.images)
        return torch.nn.functional.cross_entropy(logits, batch.labels), logits


@pytest.fixture
def data(few: Path) -> ImageDataset:
    return load_dataset(few)


class Small(TrainableNetwork):
    """Body, norm and head, over the mean colour."""

    forward_methods = ("loss",)

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.body(images.float().mean(dim=(1, 2)) / 255)))

    def loss(self) -> None:
        """Exist: the loop marks the forward methods."""


def header_of(data: ImageDataset, config: TrainingConfig) -> Header:
    """A teacher's header, as the loop needs it."""
    stage = TrainStage(method="plain", backbone="small", weights=StartingWeights(source="none"), training=config)
    return Header(
        schema=SCHEMA, kind="teacher", method="plain", backbone="small", labels=data.labels, dataset="f",
        input=InputSpec(height=32, width=32), mean=(0.0,) * 3, std=(255.0,) * 3, split=SplitSpec(), stages=(stage,),
        edgefg="0",
    )  # fmt: skip


def trained(
    data: ImageDataset, out: Path, config: TrainingConfig, hardware: Hardware, objective: Objective
) -> tuple[Small, metrics.Scores | None]:
    torch.manual_seed(0)
    network = Small()
    scores = fit(network, header_of(data, config), data, objective, out, new_modules=[network.head], hardware=hardware)
    return network, scores


def test_ema_is_the_moving_average_of_the_weights(
    data: ImageDataset, tmp_path: Path, config: TrainingConfig, hardware: Hardware
) -> None:
    spy = Spy()
    averaged, _ = trained(data, tmp_path / "ema", with_options(config, ema=0.8), hardware, spy)
    last, _ = trained(data, tmp_path / "plain", config, hardware, Spy())
    steps = [*spy.weights[1:], last.state_dict()]
    for name in ("body.weight", "head.bias", "norm.running_mean"):
        expected = steps[0][name].double()
        for step in steps[1:]:
            expected = 0.8 * expected + 0.2 * step[name].double()
        assert torch.allclose(averaged.state_dict()[name].double(), expected, atol=1e-6), name


def test_frozen_epochs_train_the_head_alone(
    data: ImageDataset, tmp_path: Path, config: TrainingConfig, hardware: Hardware
) -> None:
    spy = Spy()
    network, _ = trained(data, tmp_path, with_options(config, freeze_epochs=1), hardware, spy)
    steps = len(spy.weights) // 3
    first, unfrozen, last = spy.weights[0], spy.weights[steps], spy.weights[-1]
    for name in ("body.weight", "norm.weight", "norm.running_mean"):
        assert torch.equal(first[name], unfrozen[name]), name
        assert not torch.equal(unfrozen[name], last[name]), name
    assert not torch.equal(first["head.weight"], unfrozen["head.weight"])
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_patience_stops_and_keeps_the_best(
    data: ImageDataset, tmp_path: Path, config: TrainingConfig, hardware: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    planned = iter([0.2, 0.6, 0.6, 0.5, 0.9, 0.9])
    score = loop.score

    def scored(network: nn.Module, *args: Any) -> metrics.Scores:
        scores = score(network, *args)
        assert scores is not None
        seen.append({name: value.clone() for name, value in network.state_dict().items()})
        return replace(scores, top1=next(planned))

    monkeypatch.setattr(loop, "score", scored)
    network, scores = trained(data, tmp_path, with_options(config, epochs=9, patience=2), hardware, Spy())
    # The best is that of epoch 2, which epochs 3 and 4 do not beat; then it is scored once more.
    assert [float(row["top1"]) for row in rows(tmp_path)] == [0.2, 0.6, 0.6, 0.5]
    assert all(torch.equal(value, seen[1][name]) for name, value in network.state_dict().items())
    assert not torch.equal(seen[1]["body.weight"], seen[3]["body.weight"])
    assert len(seen) == 5
    assert scores is not None


def test_patience_counts_to_the_last_scored_epoch() -> None:
    best = RunProgress(epochs_done=3, best_epoch=3, best_top1=0.5)
    every_third = TrainingConfig(image_size=32, schedule=Schedule(epochs=20, val_every=3, patience=2))
    over = [
        done for done in range(3, 9) if loop._is_over(replace(best, epochs_done=done), every_third, TrainableNetwork())
    ]
    assert over == [6, 7, 8]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_run_resumes_on_a_gpu(
    few: Path, tmp_path: Path, config: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = Hardware(accelerator="cuda", workers=0)
    config = with_options(config, ema=0.9, patience=3)
    cut_off(monkeypatch, after=1)
    with pytest.raises(KeyboardInterrupt):
        run(few, tmp_path, config, there)
    monkeypatch.undo()
    run(few, tmp_path, config, there)
    assert len(rows(tmp_path)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [["--freeze-epochs", "1"], PROPOSALS_FIRST])
def test_several_devices_do_not_wait_for_frozen_parameters(frozen: list[str], few: Path, tmp_path: Path) -> None:
    # A process of its own, since each device's starts the command again.
    done = subprocess.run(
        [
            *(str(Path(sys.executable).with_name("edgefg")), "train", str(few), "--out", str(tmp_path), *frozen),
            *("--backbone", "resnet10t", "--weights", "none", "--image-size", "32", "--batch-size", "8"),
            *("--epochs", "2", "--workers", "0", "--accelerator", "cpu", "--devices", "2"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(rows(tmp_path)) == 2


class Learning(Objective):
    """An objective with parameters of its own, one of which no image reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.idle = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(3))

    def forward(self, network: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        logits = network(batch.images)
        return torch.nn.functional.cross_entropy(logits + self.shift, batch.labels) + 0 * self.idle.sum(), logits


def test_what_an_objective_learns_is_no_part_of_the_network(
    data: ImageDataset, tmp_path: Path, config: TrainingConfig, hardware: Hardware
) -> None:
    objective = Learning()
    network, _ = trained(data, tmp_path, with_options(config, weight_decay=0.0), hardware, objective)
    assert objective.shift.abs().min() > 0
    assert torch.equal(objective.idle, torch.ones(3))
    assert network.state_dict().keys() == Small().state_dict().keys()


def test_processes_share_the_gradients_of_what_an_objective_learns() -> None:
    shared: list[torch.Tensor] = []
    objective = Learning()
    for parameter in objective.parameters():
        parameter.grad = torch.ones(3)
    two, one = (SimpleNamespace(world_size=size, all_reduce=shared.append) for size in (2, 1))
    rest: dict[str, Any] = dict.fromkeys(loop._Loop._fields) | {"objective": objective}
    loop._Loop(**rest | {"fabric": one}).share_gradients()
    assert not shared
    loop._Loop(**rest | {"fabric": two}).share_gradients()
    assert [id(gradient) for gradient in shared] == [id(parameter.grad) for parameter in objective.parameters()]


def test_without_val_patience_never_stops(
    data: ImageDataset, tmp_path: Path, config: TrainingConfig, hardware: Hardware
) -> None:
    data = replace(data, splits={**data.splits, "val": ()})
    _, scores = trained(data, tmp_path, with_options(config, patience=1), hardware, Spy())
    assert scores is None
    assert len(rows(tmp_path)) == 3


def test_patience_of_a_teacher_is_what_its_checkpoint_holds(
    few: Path, tmp_path: Path, config: TrainingConfig, hardware: Hardware
) -> None:
    path = run(few, tmp_path, with_options(config, epochs=5, patience=2, lr=3e-3), hardware)
    _, header = load(path)
    assert header.validation is not None
    assert header.validation.top1 == pytest.approx(max(float(row["top1"]) for row in rows(tmp_path)), abs=1e-5)


def test_a_lost_loss_names_step_files_and_last_good_state(
    data: ImageDataset, tmp_path: Path, config: TrainingConfig, hardware: Hardware
) -> None:
    steps = -(-len(data.splits["train"]) // 8)
    shown: list[list[int]] = []

    class Lost(Objective):
        def forward(self, network: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
            assert batch.indices is not None
            shown.append(batch.indices.tolist())
            logits = network(batch.images)
            return logits.mean() * (torch.nan if len(shown) == steps + 2 else 1), logits

    with pytest.raises(TrainingError) as caught:
        trained(data, tmp_path, config, hardware, Lost())
    message = str(caught.value)
    assert message.startswith("the loss is nan at epoch 2, step 2, in the batch ")
    for index in shown[-1]:
        assert str(data.splits["train"][index].path) in message
    assert message.count(str(data.root)) == len(shown[-1])
    state = tmp_path / "teacher.resume.safetensors"
    assert f"{state} holds the run after epoch 1" in message
    assert state.exists()
    assert "--restart" in message
    assert "\n" not in message


def test_the_first_epoch_has_no_good_state_to_name(
    data: ImageDataset, tmp_path: Path, config: TrainingConfig, hardware: Hardware
) -> None:
    class Lost(Objective):
        def forward(self, network: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
            logits = network(batch.images)
            return logits.mean() * torch.inf, logits

    with pytest.raises(TrainingError, match=r"epoch 1, step 1, .*\. No epoch was finished"):
        trained(data, tmp_path, config, hardware, Lost())


@pytest.mark.parametrize(
    "wrong", [{"sampler": "pk", "per_class": 3}, {"mix": "mixup", "center_weight": 0.1}, {"triplet_weight": 1.0}]
)
def test_what_does_not_go_together_ends_before_the_first_step(
    wrong: dict[str, Any], few: Path, tmp_path: Path, config: TrainingConfig, hardware: Hardware,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("edgefg.training.loop.fit.set_lr", lambda *_: pytest.fail("a step began"))
    with pytest.raises(TrainingError):
        run(few, tmp_path, with_options(config, **wrong), hardware)


def test_patience_counts_the_epochs_of_the_classifiers_alone(
    birds: Path, tmp_path: Path, hardware: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = loop.score
    monkeypatch.setattr(loop, "score", lambda *args: replace(cast(Scores, score(*args)), top1=0.0))
    config = TrainingConfig(image_size=32, schedule=Schedule(epochs=10, batch_size=27, patience=2))
    options = {"size2": 1.0, "size3": 1.0, "hidden": 8, "grid": 2, "warm_share": 0.0, "peak_share": 0.4}
    train_teacher(
        birds, tmp_path, config, backbone="test_efficientnet", method="racnn", options=options, weights="none",
        hardware=hardware,
    )  # fmt: skip
    phases = [phase_of(epoch, 10, RACNNOptions(warm_share=0, peak_share=0.4)) for epoch in range(10)]
    second = [epoch for epoch, phase in enumerate(phases) if phase is Phase.CLASSIFY][1]
    assert second > 4
    assert len((tmp_path / "teacher.csv").read_text().splitlines()) == 1 + second + 1
