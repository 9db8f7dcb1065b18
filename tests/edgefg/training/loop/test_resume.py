from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric.plugins import Precision
from msgspec.structs import replace
from torch import nn

from edgefg.artifact.stages import StartingWeights, TrainStage
from edgefg.errors import TrainingError
from edgefg.preprocess import InputSpec
from edgefg.settings.hardware import Hardware
from edgefg.settings.options import with_options
from edgefg.settings.split import SplitSpec
from edgefg.settings.training import Schedule, TrainingConfig
from edgefg.training.checkpoint import SCHEMA, Header, write_tensors
from edgefg.training.loop.resume import RunProgress, UnfinishedRun, load_state, save_state
from edgefg.training.teacher import train_teacher

STAGE = TrainStage(
    method="plain", backbone="x", weights=StartingWeights(source="none"), training=TrainingConfig(image_size=32)
)
HEADER = Header(
    schema=SCHEMA, kind="teacher", method="plain", backbone="x", labels=("a", "b"), dataset="d",
    input=InputSpec(height=32, width=32), mean=(0.0,) * 3, std=(1.0,) * 3, split=SplitSpec(), stages=(STAGE,),
    edgefg="1",
)  # fmt: skip


def parts() -> tuple[dict[str, nn.Module], torch.optim.Optimizer]:
    torch.manual_seed(0)
    network = nn.Linear(2, 2)
    return {"network": network}, torch.optim.AdamW(network.parameters(), lr=0.1)


def saved(path: Path, header: Header = HEADER) -> dict[str, nn.Module]:
    """Save a run after a step; returns its modules."""
    modules, optimizer = parts()
    modules["network"](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    progress = RunProgress(epochs_done=2, best_epoch=1, best_top1=0.5)
    save_state(UnfinishedRun(path, header), modules, optimizer, Precision(), progress)
    return modules


def test_a_run_without_a_state_begins(tmp_path: Path) -> None:
    assert load_state(UnfinishedRun(tmp_path / "x.safetensors", HEADER), *parts(), Precision()) == RunProgress()


def test_networks_optimiser_and_progress_come_back(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    before = saved(path)
    modules, optimizer = parts()
    progress = load_state(UnfinishedRun(path, HEADER), modules, optimizer, Precision())
    assert progress == RunProgress(epochs_done=2, best_epoch=1, best_top1=0.5)
    for name, tensor in before["network"].state_dict().items():
        assert torch.equal(modules["network"].state_dict()[name], tensor)
    assert {int(slots["step"]) for slots in optimizer.state_dict()["state"].values()} == {1}


def changed(**fields: Any) -> Header:
    return replace(HEADER, stages=(replace(STAGE, **fields),))


@pytest.mark.parametrize(
    ("header", "difference"),
    [
        (changed(training=TrainingConfig(image_size=32, schedule=Schedule(lr=0.5))), "lr 0.001, now 0.5"),
        (changed(weights=StartingWeights(source="hub")), "source none, now hub"),
        (changed(parents=("a" * 64,)), f"parents None, now {'a' * 64}"),
        (replace(HEADER, dataset="other"), "dataset d, now other"),
        (replace(HEADER, split=SplitSpec(seed=3)), "seed 0, now 3"),
    ],
)
def test_another_run_is_refused_with_the_first_difference(tmp_path: Path, header: Header, difference: str) -> None:
    path = tmp_path / "x.safetensors"
    saved(path)
    with pytest.raises(TrainingError) as refusal:
        load_state(UnfinishedRun(path, header), *parts(), Precision())
    assert str(refusal.value) == (
        f"{path} is an unfinished run with {difference}. Give another --out, or --restart to start again"
    )


def test_versions_of_software_are_not_compared(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    saved(path)
    header = replace(HEADER, edgefg="2", stages=(replace(STAGE, versions={"torch": "99"}),))
    assert load_state(UnfinishedRun(path, header), *parts(), Precision()).epochs_done == 2


def test_a_setting_that_came_later_has_its_default(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    state = {"header": json.loads(json.dumps(header_as_json())), "progress": {"epochs_done": 1}}
    del state["header"]["stages"][0]["training"]["schedule"]["ema"]
    write_tensors(path, {"network.weight": torch.zeros(2, 2), "network.bias": torch.zeros(2)}, json.dumps(state))
    assert load_state(UnfinishedRun(path, HEADER), *parts(), Precision()).epochs_done == 1


def header_as_json() -> Any:
    import msgspec

    return json.loads(msgspec.json.encode(HEADER))


def test_a_state_of_an_earlier_edgefg_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    state = {"recipe": {"epochs": 2, "image_size": 32}, "fingerprint": "f", "stage": "teacher", "progress": {}}
    write_tensors(path, {"network.bias": torch.zeros(2)}, json.dumps(state))
    with pytest.raises(TrainingError, match="of another version of edgefg, which cannot be resumed") as refusal:
        load_state(UnfinishedRun(path, HEADER), *parts(), Precision())
    assert "\n" not in str(refusal.value)


def run(birds: Path, out: Path, config: TrainingConfig, hardware: Hardware, **options: Any) -> Path:
    return train_teacher(birds, out, config, backbone="test_efficientnet", weights="none", hardware=hardware, **options)


def test_an_unfinished_run_of_other_settings_is_not_overwritten(
    birds: Path, tmp_path: Path, config: TrainingConfig, hardware: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("edgefg.training.loop.stage.save", killed)
    with pytest.raises(KeyboardInterrupt):
        run(birds, tmp_path, config, hardware)
    monkeypatch.undo()
    state = tmp_path / "teacher.resume.safetensors"
    other = with_options(config, lr=9e-3)
    with pytest.raises(TrainingError, match=r"unfinished run with lr 0\.001, now 0\.009.*--restart"):
        run(birds, tmp_path, other, hardware)
    assert state.exists()
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(TrainingError, match="cannot be resumed"):
        run(birds, tmp_path, config, hardware)
    run(birds, tmp_path, other, hardware, restart=True)
    assert not state.exists()
