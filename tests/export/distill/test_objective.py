from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from torch import nn

from edgefg import __version__
from edgefg.artifact.hashes import sha256
from edgefg.data.split import UNLABELLED
from edgefg.errors import DataError, WeightsError
from edgefg.export.distill.losses import attention_distance, dkd, feature_distance, kl_divergence
from edgefg.export.distill.objective import DistillationObjective, Teacher, load_teachers
from edgefg.preprocess import InputSpec
from edgefg.settings.distillation import DistillationConfig
from edgefg.settings.options import with_options
from edgefg.settings.split import SplitSpec
from edgefg.settings.training import Schedule, TrainingConfig
from edgefg.training.checkpoint import SCHEMA, Header, save
from edgefg.training.data.mix import evaluating
from edgefg.training.methods import build
from edgefg.training.models import backbone as parts
from edgefg.training.models.network import Batch, Network

CONFIG = TrainingConfig(image_size=32, schedule=Schedule(epochs=1, batch_size=16, label_smoothing=0.0))
MEAN, STD = (127.0,) * 3, (60.0,) * 3
HEADER = Header(
    schema=SCHEMA, kind="teacher", method="plain", backbone="test_resnet", labels=("a", "b", "c"),
    input=InputSpec(height=32, width=32), mean=MEAN, std=STD, dataset="d" * 64, split=SplitSpec(), edgefg=__version__,
)  # fmt: skip


class Recorder(nn.Module):
    """Gives fixed logits and keeps what it saw."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([logits]))
        self.seen: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(images)
        return self.logits.expand(len(images), -1)


class Reader(nn.Module):
    """Gives logits that the first pixel of an image holds."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, 0, 0].float() / 100


def teacher(network: nn.Module, height: int = 32, width: int = 32) -> Teacher:
    header = replace(HEADER, input=InputSpec(height=height, width=width))
    return Teacher(network.requires_grad_(False), header, "e" * 64)


def plain(name: str, classes: int = 3) -> Network:
    torch.manual_seed(1)
    return Network(parts.build_backbone(name, classes), MEAN, STD)


def noise(count: int = 3) -> torch.Tensor:
    return torch.randint(0, 255, (count, 32, 32, 3), dtype=torch.uint8)


def test_teacher_and_student_see_identical_crops() -> None:
    big, small = Recorder(2.0, 0.0, 0.0), Recorder(0.0, 0.0, 0.0)
    objective = DistillationObjective([teacher(big)], small, CONFIG, DistillationConfig(hard_weight=0.25))
    loss, logits = objective(small, Batch(noise(), torch.tensor([0, 1, 1])))
    assert torch.equal(big.seen[0], small.seen[0])
    assert logits.shape == (3, 3)
    p = torch.softmax(torch.tensor([2.0, 0.0, 0.0]), 0)
    assert loss.item() == pytest.approx((0.75 * (p * (p * 3).log()).sum() + 0.25 * np.log(3)).item(), rel=1e-5)
    loss.backward()
    assert big.logits.grad is None
    assert small.logits.grad is not None
    assert not objective.state_dict()


def test_a_teacher_of_another_size_sees_the_same_crop_resized() -> None:
    teachers = [Recorder(1.0, 0.0, 0.0), Recorder(1.0, 0.0, 0.0)]
    small = Recorder(0.0, 0.0, 0.0)
    images = torch.full((2, 32, 32, 3), 77, dtype=torch.uint8)
    objective = DistillationObjective([teacher(teachers[0], 64, 48), teacher(teachers[1])], small, CONFIG)
    objective(small, Batch(images, torch.tensor([0, 1])))
    assert teachers[0].seen[0].shape == (2, 64, 48, 3)
    assert torch.allclose(teachers[0].seen[0], torch.tensor(77.0))
    assert torch.equal(teachers[1].seen[0], images)


def test_teacher_and_student_see_identically_mixed_crops() -> None:
    big, small = Recorder(2.0, 0.0, 0.0), Recorder(1.0, 0.0, 0.0)
    objective = DistillationObjective(
        [teacher(big)], small, with_options(CONFIG, mix="mixup"), DistillationConfig(hard_weight=1.0)
    )
    images = torch.tensor([0, 200], dtype=torch.uint8)[:, None, None, None].expand(-1, 32, 32, 3)
    torch.manual_seed(0)
    loss, _ = objective(small, Batch(images, torch.tensor([0, 1])))
    assert torch.equal(big.seen[0], small.seen[0])
    share = 1 - big.seen[0][0].mean().item() / 200
    assert 0 < share < 1
    assert torch.allclose(big.seen[0][1], torch.tensor(200 * share), atol=1e-2)
    # Hard labels are the mixed ones: one image of each class, with shares that change places.
    log = torch.log_softmax(torch.tensor([1.0, 0.0, 0.0]), 0)
    assert loss.item() == pytest.approx(-log[:2].mean().item(), rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_target_of_several_teachers_is_the_mean_of_their_softmaxes(temperature: float) -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 3.0, 0.5]])
    student = torch.tensor([0.3, 0.1, 0.0])
    small = Recorder(*student.tolist())
    objective = DistillationObjective(
        [teacher(Recorder(*row.tolist())) for row in logits], small, CONFIG, DistillationConfig(temperature=temperature)
    )
    loss, _ = objective(small, Batch(noise(1), torch.tensor([0])))
    p, q = torch.softmax(logits / temperature, 1).mean(0), torch.softmax(student / temperature, 0)
    assert loss.item() == pytest.approx((temperature**2 * (p * (p / q).log()).sum()).item(), rel=1e-5)


@pytest.mark.parametrize("mix", ["none", "mixup"])
def test_dkd_takes_the_label_and_where_there_is_no_single_one_the_teacher_s_top_class(mix: str) -> None:
    big, small = Reader(), Recorder(0.0, 1.0, 0.5)
    objective = DistillationObjective(
        [teacher(big)],
        small,
        with_options(CONFIG, mix=mix),
        DistillationConfig(loss="dkd", dkd_beta=2.0, hard_weight=0.0),
    )
    images = torch.zeros(3, 32, 32, 3, dtype=torch.uint8)
    images[:, 0, 0] = torch.tensor([[250, 10, 0], [0, 20, 240], [3, 200, 90]])
    torch.manual_seed(0)
    loss, logits = objective(small, Batch(images, torch.tensor([1, UNLABELLED, UNLABELLED])))
    wanted = big(small.seen[0])
    target = torch.tensor([1, 2, 1]) if mix == "none" else wanted.argmax(dim=1)
    assert loss.item() == pytest.approx(dkd(logits, wanted, target, beta=2.0).item(), rel=1e-6)
    other = dkd(logits, wanted, torch.tensor([1, 0, 0]), beta=2.0)
    assert abs(loss.item() - other.item()) > 1e-3


def softmax(rows: np.ndarray) -> np.ndarray:
    return np.exp(rows) / np.exp(rows).sum(axis=1, keepdims=True)


def kl(p: np.ndarray, q: np.ndarray) -> float:
    """Mean over the rows."""
    return float((p * np.log(p / q)).sum(axis=1).mean())


def apart(p: np.ndarray, q: np.ndarray) -> float:
    """Mean over the rows of 1 − Pearson's correlation."""
    return float(np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)]))


@pytest.mark.parametrize(
    ("distillation", "beta"),
    [
        (DistillationConfig(), None),
        (DistillationConfig(temperature=2.0), None),
        (DistillationConfig(loss="dist"), None),
        (DistillationConfig(loss="dist", temperature=2.0), None),
        (DistillationConfig(loss="dkd"), 0.5),
        (DistillationConfig(loss="dkd", temperature=4.0), 8.0),
        (DistillationConfig(loss="dkd", temperature=4.0, dkd_beta=3.0), 3.0),
    ],
)
def test_by_default_the_loss_is_the_paper_s_sum(distillation: DistillationConfig, beta: float | None) -> None:
    images = torch.zeros(3, 32, 32, 3, dtype=torch.uint8)
    images[:, 0, 0] = torch.tensor([[250, 10, 0], [0, 120, 240], [30, 200, 90]])
    student = np.array([[1.0, 0.5, -0.5], [0.2, 0.9, 0.4], [-1.0, 0.7, 0.3]])
    labels = np.array([0, 2, 0])

    class Fixed(nn.Module):
        def forward(self, _: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(student).float()

    t, rows = distillation.temperature, np.arange(3)
    p, q = softmax(images[:, 0, 0].numpy() / 100 / t), softmax(student / t)
    hard = -float(np.log(softmax(student)[rows, labels]).mean())
    if distillation.loss == "kl":
        expected = t**2 * kl(p, q)
    elif distillation.loss == "dist":
        expected = (hard + 2 * t**2 * apart(p, q) + 2 * t**2 * apart(p.T, q.T)) / 2
    else:
        pairs = [np.stack([x[rows, labels], 1 - x[rows, labels]], axis=1) for x in (p, q)]
        mask = np.eye(3, dtype=bool)[labels]
        others = [x[~mask].reshape(3, 2) / (1 - x[mask])[:, None] for x in (p, q)]
        expected = (hard + t**2 * (kl(*pairs) + beta * kl(*others))) / 2
    loss, _ = DistillationObjective([teacher(Reader())], Fixed(), CONFIG, distillation)(
        Fixed(), Batch(images, torch.tensor(labels))
    )
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_with_dist_a_student_that_is_hardly_sure_of_what_is_right_has_much_to_learn() -> None:
    class Paler(Reader):
        """As the teacher, with a share of its probabilities evened out."""

        def __init__(self, share: float) -> None:
            super().__init__()
            self.share = share

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            p = torch.softmax(super().forward(images), dim=1)
            return ((1 - self.share) * p + self.share / 3).log()

    images = torch.zeros(3, 32, 32, 3, dtype=torch.uint8)
    images[:, 0, 0] = torch.tensor([[250, 10, 0], [0, 20, 240], [3, 200, 90]])
    batch = Batch(images, torch.tensor([0, 2, 1]))
    sure, pale = (
        DistillationObjective([teacher(Reader())], student, CONFIG, DistillationConfig(loss="dist"))(student, batch)[
            0
        ].item()
        for student in (Paler(0.0), Paler(0.99))
    )
    assert pale == pytest.approx(np.log(3) / 2, rel=0.05)
    assert sure < 0.5 * pale
    # The relations alone tell the two from each other by nothing.
    student = Paler(0.99)
    alone = DistillationObjective(
        [teacher(Reader())], student, CONFIG, DistillationConfig(loss="dist", hard_weight=0.0)
    )
    assert alone(student, batch)[0].item() == pytest.approx(0, abs=1e-4)


def test_images_without_label_have_no_cross_entropy_and_learn_from_the_teacher() -> None:
    big, small = Recorder(2.0, 0.0, 0.0), Recorder(1.0, 0.0, 0.0)
    log = torch.log_softmax(small.logits.detach()[0], 0)
    hard = DistillationObjective([teacher(big)], small, CONFIG, DistillationConfig(hard_weight=1.0))
    loss, _ = hard(small, Batch(noise(4), torch.tensor([0, UNLABELLED, 2, UNLABELLED])))
    # Two of four images; each labelled one weighs as in any other batch.
    assert loss.item() == pytest.approx(-(log[0] + log[2]).item() / 4, rel=1e-5)
    nothing, _ = hard(small, Batch(noise(2), torch.full((2,), UNLABELLED)))
    assert nothing.item() == 0
    nothing.backward()
    soft = DistillationObjective([teacher(big)], small, CONFIG)
    loss, logits = soft(small, Batch(noise(2), torch.full((2,), UNLABELLED)))
    assert loss.item() == pytest.approx(kl_divergence(logits, big.logits.expand(2, -1)).item())


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_an_image_mixed_with_one_without_label_has_no_cross_entropy(mix: str) -> None:
    small = Recorder(1.0, 0.0, 0.0)
    objective = DistillationObjective(
        [teacher(Recorder(0.0, 0.0, 0.0))], small, with_options(CONFIG, mix=mix), DistillationConfig(hard_weight=1.0)
    )
    # Images 2 and 3, mixed with the ones before them, are the only pairs of labelled ones; all of those are of class 1.
    loss, _ = objective(small, Batch(noise(4), torch.tensor([UNLABELLED, 1, 1, 1])))
    assert loss.item() == pytest.approx(-torch.log_softmax(small.logits.detach()[0], 0)[1].item() / 2, rel=1e-5)


def test_snapmix_takes_images_without_label() -> None:
    student = plain("test_resnet")
    objective = DistillationObjective(
        [teacher(plain("resnet10t").eval())], student, with_options(CONFIG, mix="snapmix")
    )
    loss, _ = objective(student, Batch(noise(4), torch.tensor([UNLABELLED, 1, UNLABELLED, 2])))
    assert loss.isfinite()


def test_maps_of_every_teacher_are_matched_by_a_regressor_of_its_own() -> None:
    teachers = [teacher(plain("resnet10t").eval(), 64, 64), teacher(plain("test_efficientnet").eval())]
    student = plain("test_resnet").eval()
    distillation = DistillationConfig(feature_weight=0.5, attention_weight=2.0)
    objective = DistillationObjective(teachers, student, CONFIG, distillation)
    batch = Batch(noise(), torch.tensor([0, 1, 2]))
    loss, logits = objective(student, batch)
    images = batch.images
    with torch.no_grad():
        networks: list[Any] = [t.network for t in teachers]
        pairs = zip(networks, teachers, strict=True)
        theirs = [parts.maps(each.backbone, each.normalised(t.view(images))) for each, t in pairs]
        ours = parts.maps(student.backbone, student.normalised(images))
        features = [feature_distance(a(ours), t) for a, t in zip(objective._adapters, theirs, strict=True)]
        attention = [attention_distance(ours, t) for t in theirs]
        soft, _ = DistillationObjective(teachers, student, CONFIG)(student, batch)
    assert torch.allclose(logits, student(images), atol=1e-5)
    expected = soft + 0.5 * torch.stack(features).mean() + 2 * torch.stack(attention).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    loss.backward()
    learned = [*objective.parameters(), next(student.parameters())]
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in learned)
    assert all(parameter.grad is None for t in teachers for parameter in t.network.parameters())
    # Regressors alone, no teacher and no student.
    assert sorted(objective.state_dict()) == [f"_adapters.{i}.{name}" for i in (0, 1) for name in ("bias", "weight")]


def test_attention_alone_needs_no_regressor() -> None:
    student = plain("test_resnet")
    objective = DistillationObjective(
        [teacher(plain("resnet10t").eval())], student, CONFIG, DistillationConfig(attention_weight=1.0)
    )
    assert not list(objective.parameters())
    assert objective(student, Batch(noise(), torch.tensor([0, 1, 2])))[0].isfinite()


@pytest.mark.parametrize("weights", [DistillationConfig(feature_weight=1.0), DistillationConfig(attention_weight=1.0)])
def test_a_student_without_maps_is_told_so(weights: DistillationConfig) -> None:
    with pytest.raises(
        WeightsError, match=r"--feature-weight and --attention-weight compare feature maps, and .*convol"
    ):
        DistillationObjective([teacher(plain("test_resnet").eval())], plain("test_vit"), CONFIG, weights)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("plain", {}),
        ("se", {}),
        ("wsdan", {"maps": 4}),
        ("wsdan", {"maps": 4, "passes": 1}),
        ("racnn", {"size2": 1.0, "size3": 1.0}),
        ("partrcnn", {"parts": "object,mark", "width": 16, "proposals": 10, "region_size": 0.5}),
        ("bcnn", {"projection": 8}),
    ],
)
def test_every_method_gives_its_own_prediction_and_the_whole_image_s_maps(
    method: str, options: dict[str, object]
) -> None:
    torch.manual_seed(0)
    network = build(method, parts.build_backbone("resnet10t", 3), MEAN, STD, options).eval()
    images = torch.randint(0, 255, (2, 64, 64, 3), dtype=torch.uint8)
    with torch.no_grad(), evaluating(network):
        logits, maps = network.logits_and_maps(images)
        assert torch.allclose(logits, network(images), atol=1e-5)
        assert torch.allclose(maps, parts.maps(network.backbone, network.normalised(images)), atol=1e-5)


def write(path: Path, seed: int = 0, **fields: Any) -> Path:
    header = replace(HEADER, **fields)
    torch.manual_seed(seed)
    save(path, Network(parts.build_backbone("test_resnet", len(header.labels)), MEAN, STD), header)
    return path


def test_teachers_are_read_and_frozen(tmp_path: Path) -> None:
    paths = [write(tmp_path / "a.safetensors"), write(tmp_path / "b.safetensors", 1)]
    teachers = load_teachers(paths)
    assert [t.sha256 for t in teachers] == [sha256(path) for path in paths]
    assert not any(p.requires_grad for t in teachers for p in t.network.parameters())
    assert not any(t.network.training for t in teachers)


def test_teachers_that_do_not_go_together(tmp_path: Path) -> None:
    first = write(tmp_path / "a.safetensors")
    other = write(tmp_path / "b.safetensors", labels=("a", "c", "b"))
    with pytest.raises(DataError, match=r"b\.safetensors and .*a\.safetensors have different classes \(3 and 3, or in"):
        load_teachers([first, other])
    fold = write(tmp_path / "c.safetensors", dataset="f" * 64)
    with pytest.raises(DataError, match=r"trained on different data or splits \(fingerprints ffffffffffff and dddd"):
        load_teachers([first, fold])
    with pytest.raises(DataError, match="a checkpoint is given twice"):
        load_teachers([first, first])
