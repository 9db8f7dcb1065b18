from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from edgefg import __version__
from edgefg.artifact.hashes import sha256
from edgefg.artifact.stages import WeightAverageStage
from edgefg.data import load_dataset
from edgefg.errors import DataError, ExportError, WeightsError
from edgefg.export.distill.distill import distill
from edgefg.export.export import export_checkpoint
from edgefg.export.quantize.layer_sensitivity import sensitivity
from edgefg.export.targets import target_of
from edgefg.preprocess import InputSpec
from edgefg.settings.distillation import DistillationConfig
from edgefg.settings.hardware import Hardware
from edgefg.settings.split import SplitSpec
from edgefg.settings.training import Schedule, TrainingConfig
from edgefg.training.checkpoint import SCHEMA, Header, load, save
from edgefg.training.ensemble import combine
from edgefg.training.methods import build
from edgefg.training.models import backbone as parts
from edgefg.training.models.ensemble import Ensemble, resized

MEAN, STD = (127.0,) * 3, (60.0,) * 3
HEADER = Header(
    schema=SCHEMA, kind="teacher", method="plain", backbone="test_resnet", labels=("a", "b", "c"),
    input=InputSpec(height=32, width=32), mean=MEAN, std=STD, dataset="d" * 64, split=SplitSpec(), edgefg=__version__,
)  # fmt: skip
IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 48, 48, 3), np.uint8))


def checkpoint(path: Path, seed: int, header: Header = HEADER) -> Path:
    torch.manual_seed(seed)
    body = parts.build_backbone(header.backbone, len(header.labels))
    save(path, build(header.method, body, header.mean, header.std, header.options), header)
    return path


@pytest.fixture
def trio(tmp_path: Path) -> list[Path]:
    """Three networks of different makes and sizes."""
    small = replace(HEADER, method="bcnn", options={"projection": 8})
    large = replace(HEADER, backbone="test_efficientnet", input=InputSpec(height=48, width=48))
    return [
        checkpoint(tmp_path / "a.safetensors", 1),
        checkpoint(tmp_path / "b.safetensors", 2, small),
        checkpoint(tmp_path / "c.safetensors", 3, large),
    ]


@torch.no_grad()
def test_an_ensemble_is_the_mean_of_its_members_probabilities_each_at_its_own_size(
    trio: list[Path], tmp_path: Path
) -> None:
    network, header = load(combine(trio, tmp_path / "out"))
    expected = []
    for path in trio:
        member, its = load(path)
        expected.append(member(resized(IMAGES, its.input.height, its.input.width)).softmax(dim=1))
    torch.testing.assert_close(network(IMAGES).softmax(dim=1), torch.stack(expected).mean(dim=0))
    assert isinstance(network, Ensemble)
    assert not network.training
    assert not network.single_pass
    assert (header.method, header.kind, header.input.height) == ("ensemble", "teacher", 48)
    assert [member.backbone for member in header.members] == ["test_resnet", "test_resnet", "test_efficientnet"]


def test_inspect_shows_the_members(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    paths = [checkpoint(tmp_path / f"{n}.safetensors", n) for n in (1, 2)]
    status, out, _ = run("inspect", combine(paths, tmp_path / "out"))
    assert status == 0
    assert "members: \n  test_resnet, plain\n  test_resnet, plain\n" in out
    assert f"1. ensemble: parent {sha256(paths[0])[:12]}, parent {sha256(paths[1])[:12]}" in out


@torch.no_grad()
def test_a_soup_is_one_network_of_the_mean_weights(tmp_path: Path) -> None:
    paths = [checkpoint(tmp_path / f"{seed}.safetensors", seed) for seed in range(3)]
    path = combine(paths, tmp_path / "out", "weights")
    network, header = load(path)
    assert network.single_pass
    assert header.method == "plain"
    assert header.stages[-1].identity() == WeightAverageStage(parents=tuple(sha256(one) for one in paths))
    states = [load(one)[0].state_dict() for one in paths]
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(tensor, torch.stack([s[name].double() for s in states]).mean(0).to(tensor.dtype))


def test_a_soup_of_one_network_twice_over_is_that_network(tmp_path: Path) -> None:
    one = checkpoint(tmp_path / "a.safetensors", 1)
    other = checkpoint(
        tmp_path / "b.safetensors", 1, replace(HEADER, dataset=HEADER.dataset, backbone=HEADER.backbone, edgefg="1")
    )
    network, _ = load(combine([one, other], tmp_path / "out", "weights"))
    torch.testing.assert_close(network(IMAGES), load(one)[0](IMAGES))


def test_an_ensemble_teaches_and_does_not_export(birds: Path, tmp_path: Path, hardware: Hardware) -> None:
    data = load_dataset(birds)
    header = replace(HEADER, labels=data.labels, dataset=data.fingerprint, taxonomy=data.taxonomy)
    paths = [checkpoint(tmp_path / f"{seed}.safetensors", seed, header) for seed in range(2)]
    teacher = combine(paths, tmp_path / "ensemble")
    config = TrainingConfig(image_size=32, schedule=Schedule(epochs=1, batch_size=16))
    student = distill(teacher, birds, tmp_path / "s", config, student="test_resnet", weights="none", hardware=hardware)
    assert load(student)[1].teacher == sha256(teacher)
    with pytest.raises(WeightsError, match="which an ensemble does not have"):
        distill(
            teacher, birds, tmp_path / "t", config, student="test_resnet", weights="none", hardware=hardware,
            distillation=DistillationConfig(feature_weight=1.0),
        )  # fmt: skip
    with pytest.raises(ExportError, match="ensemble teacher"):
        export_checkpoint(teacher, tmp_path / "x", to="onnx", precision="fp32")


def test_what_does_not_go_together_is_refused(trio: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    classes = checkpoint(tmp_path / "d.safetensors", 4, replace(HEADER, labels=("a", "b", "d")))
    data = checkpoint(tmp_path / "e.safetensors", 4, replace(HEADER, dataset="f" * 64))
    squashed = replace(HEADER, input=InputSpec(height=32, width=32, crop="none"))
    crop = checkpoint(tmp_path / "f.safetensors", 4, squashed)
    for paths, average, words in [
        (trio[:1], "predictions", "at least two"),
        ([trio[0], trio[0]], "predictions", "given twice"),
        ([trio[0], classes], "predictions", "different classes"),
        ([trio[0], data], "predictions", "different data"),
        ([trio[0], crop], "predictions", "crop images differently"),
        (trio[:2], "weights", "differ in their method and options"),
        (trio[::2], "weights", "differ in their backbone and input"),
    ]:
        with pytest.raises(DataError, match=words):
            combine(paths, out, average)  # type: ignore[arg-type]
    assert not out.exists()
    combine(trio, out)
    before = (out / "teacher.safetensors").read_bytes()
    with pytest.raises(DataError, match="exists"):
        combine(trio, out)
    assert (out / "teacher.safetensors").read_bytes() == before
    with pytest.raises(DataError, match="is an ensemble itself"):
        combine([out / "teacher.safetensors", trio[0]], tmp_path / "more")


def test_an_ensemble_has_no_layers_to_scan(trio: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="not a single graph"):
        sensitivity(combine(trio, tmp_path / "out"), tmp_path, target_of("onnx"))
