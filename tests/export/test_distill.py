from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from edgefg.errors import DataError, ExportError
from edgefg.export.distill import distill, distillation, kl_divergence
from edgefg.export.export import export_checkpoint
from edgefg.export.prune import prune
from edgefg.manifest import sha256
from edgefg.recipe import Hardware, Pruning, Recipe
from edgefg.training.checkpoint import Header, load, read_header
from edgefg.training.data import FolderData
from edgefg.training.methods import METHODS
from edgefg.training.mix import mixer_of
from edgefg.training.models.network import Batch
from edgefg.training.teacher import train_teacher
from tests.synthetic import write_dataset

HERE = Hardware(accelerator="cpu", workers=0)
RECIPE = Recipe(epochs=1, image_size=32, batch_size=16)


@pytest.fixture(scope="module")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("birds"), classes=2, per_class=30, size=48, seed=2)


@pytest.fixture(scope="module")
def teacher(birds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("teacher")
    return train_teacher(birds, out, RECIPE, backbone="test_resnet", weights="none", hardware=HERE)


def test_kl_by_hand() -> None:
    teacher = np.array([[2.0, 0.0, -1.0], [0.5, 0.5, 3.0]])
    student = np.array([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    temperature = 2.0
    p, q = (np.exp(x / temperature) / np.exp(x / temperature).sum(1, keepdims=True) for x in (teacher, student))
    expected = temperature**2 * (p * np.log(p / q)).sum(1).mean()
    found = kl_divergence(torch.from_numpy(student), torch.from_numpy(teacher), temperature)
    assert found.item() == pytest.approx(expected)
    assert kl_divergence(torch.from_numpy(teacher), torch.from_numpy(teacher), 1.0).item() == pytest.approx(
        0, abs=1e-12
    )


class Recorder(nn.Module):
    """Gives fixed logits and keeps what it saw."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([logits]))
        self.seen: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(images)
        return self.logits.expand(len(images), -1)


def test_teacher_and_student_see_identical_crops(teacher: Path) -> None:
    header = read_header(teacher)
    big, small = Recorder([2.0, 0.0]), Recorder([0.0, 0.0])
    objective = distillation(big, header, temperature=1.0, hard_weight=0.25, smoothing=0.0)
    images = torch.randint(0, 255, (3, 32, 32, 3), dtype=torch.uint8)
    loss, _ = objective(small, Batch(images, torch.tensor([0, 1, 1])))
    assert torch.equal(big.seen[0], small.seen[0])
    p = torch.softmax(torch.tensor([2.0, 0.0]), 0)
    expected = 0.75 * (p * (p / 0.5).log()).sum() + 0.25 * np.log(2)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert big.logits.grad is None
    assert small.logits.grad is not None


def test_a_teacher_of_another_size_sees_the_same_crop_resized(teacher: Path) -> None:
    header = read_header(teacher)
    header = msgspec.structs.replace(header, input=msgspec.structs.replace(header.input, height=64, width=48))
    big, small = Recorder([1.0, 0.0]), Recorder([0.0, 0.0])
    images = torch.full((2, 32, 32, 3), 77, dtype=torch.uint8)
    distillation(big, header, temperature=1.0, hard_weight=0.0, smoothing=0.0)(
        small, Batch(images, torch.tensor([0, 1]))
    )
    assert big.seen[0].shape == (2, 64, 48, 3)
    assert torch.allclose(big.seen[0], torch.tensor(77.0))


def test_teacher_and_student_see_identically_mixed_crops(teacher: Path) -> None:
    header = read_header(teacher)
    big, small = Recorder([2.0, 0.0]), Recorder([1.0, 0.0])
    mix = mixer_of(msgspec.structs.replace(RECIPE, mix="mixup"), small, 2)
    objective = distillation(big, header, temperature=1.0, hard_weight=1.0, smoothing=0.0, mix=mix)
    images = torch.tensor([0, 200], dtype=torch.uint8)[:, None, None, None].expand(-1, 32, 32, 3)
    torch.manual_seed(0)
    loss, _ = objective(small, Batch(images, torch.tensor([0, 1])))
    assert torch.equal(big.seen[0], small.seen[0])
    share = 1 - big.seen[0][0].mean().item() / 200
    assert 0 < share < 1
    assert torch.allclose(big.seen[0][1], torch.tensor(200 * share), atol=1e-2)
    # Hard labels are the mixed ones: one image of each class, with shares that change places.
    log = torch.log_softmax(torch.tensor([1.0, 0.0]), 0)
    assert loss.item() == pytest.approx(-log.mean().item(), rel=1e-5)


@pytest.mark.parametrize("mix", ["cutmix", "snapmix"])
def test_distil_with_mixing(mix: str, teacher: Path, birds: Path, tmp_path: Path) -> None:
    mixed = msgspec.structs.replace(RECIPE, mix=mix)
    options = {"student": "test_efficientnet", "weights": "none", "hardware": HERE}
    network, header = load(distill(teacher, birds, tmp_path / "mixed", mixed, **options))
    assert f'"mix":"{mix}"' in header.recipe
    plain, _ = load(distill(teacher, birds, tmp_path / "plain", RECIPE, **options))
    weights = zip(network.parameters(), plain.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in weights)


def test_distil_then_prune(teacher: Path, birds: Path, tmp_path: Path) -> None:
    student = distill(
        teacher, birds, tmp_path, RECIPE, student="test_efficientnet", weights="none", hardware=HERE
    )  # fmt: skip
    header = read_header(student)
    assert (header.kind, header.teacher) == ("student", sha256(teacher))
    assert header.labels == read_header(teacher).labels
    pruned = prune(
        student, birds, tmp_path, RECIPE, Pruning(macs=0.8, round_to=8), teacher_path=teacher, hardware=HERE
    )  # fmt: skip
    network, header = load(pruned)
    assert (header.kind, header.parent, header.teacher) == ("pruned", sha256(student), sha256(teacher))
    assert header.channels
    assert header.validation is not None
    assert "; prune to 0.8 of macs by taylor, global" in header.recipe
    assert "; left: 0." in header.recipe
    before, _ = load(student)
    counts = [sum(p.numel() for p in model.parameters()) for model in (network, before)]
    assert counts[0] < counts[1]


@pytest.mark.parametrize("stage", ["distill", "prune"])
def test_boxes_of_parts_do_not_hold_back_the_augmentation(
    stage: str, teacher: Path, birds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[FolderData] = []

    def spied(network: nn.Module, header: Header, data: FolderData, *args: object, **others: object) -> Path:
        trained.append(data)
        return tmp_path

    monkeypatch.setattr(f"edgefg.export.{stage}.train_and_save", spied)
    if stage == "distill":
        distill(teacher, birds, tmp_path, RECIPE, student="test_efficientnet", weights="none", hardware=HERE)
    else:
        prune(teacher, birds, tmp_path, RECIPE, Pruning(macs=0.95, round_to=4), hardware=HERE)
    assert (birds / "boxes.csv").is_file()
    assert [data.boxes for data in trained] == [None]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("wsdan", {"maps": 4}),
        ("racnn", {"size2": 1.0, "size3": 1.0}),
        ("partrcnn", {"parts": "object,mark", "width": 16, "proposals": 10, "region_size": 0.5}),
        ("bcnn", {"projection": 8}),
    ],
)
def test_every_kind_of_teacher_distils_and_is_not_pruned(
    method: str, options: dict[str, object], birds: Path, tmp_path: Path
) -> None:
    teacher = train_teacher(
        birds, tmp_path, RECIPE, backbone="resnet10t", method=method, options=options, weights="none", hardware=HERE
    )
    student = distill(teacher, birds, tmp_path, RECIPE, student="test_efficientnet", weights="none", hardware=HERE)
    network, header = load(student)
    assert (header.method, header.teacher) == ("plain", sha256(teacher))
    assert header.validation is not None
    assert network(torch.zeros(1, 32, 32, 3, dtype=torch.uint8)).shape == (1, 2)
    with pytest.raises(DataError, match=f"is a {method} teacher, and only a plain network can be pruned"):
        prune(teacher, birds, tmp_path, RECIPE, hardware=HERE)
    artifact = tmp_path / "artifact"
    if not METHODS[method].single_pass:
        with pytest.raises(ExportError, match=f"is a {method} teacher, which looks at an image several times"):
            export_checkpoint(teacher, artifact, to="onnx", precision="fp32")
        assert not artifact.exists()


def test_wrong_data_and_targets(teacher: Path, birds: Path, tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "other", classes=3, per_class=10, size=48, seed=2)
    with pytest.raises(DataError, match="has 3 classes, the checkpoint 2"):
        distill(teacher, other, tmp_path, RECIPE, student="test_efficientnet", weights="none", hardware=HERE)
    with pytest.raises(DataError, match=r"--macs 1\.5 is out of range: needed a share between 0 and 1"):
        prune(teacher, birds, tmp_path, RECIPE, Pruning(macs=1.5), hardware=HERE)
