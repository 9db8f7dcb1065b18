from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from edgefg.artifact.hashes import sha256
from edgefg.artifact.stages import DistillStage, PruneStage
from edgefg.data import ImageDataset, load_dataset
from edgefg.data.split import UNLABELLED
from edgefg.errors import DataError, ExportError
from edgefg.export.distill.distill import distill
from edgefg.export.distill.objective import DistillationObjective
from edgefg.export.export import export_checkpoint
from edgefg.export.prune.prune import prune
from edgefg.image_io import image_files
from edgefg.settings.distillation import DistillationConfig
from edgefg.settings.options import with_options
from edgefg.settings.pruning import PruningConfig
from edgefg.settings.training import Schedule, TrainingConfig
from edgefg.training.checkpoint import Header, load, read_header
from edgefg.training.methods import METHODS
from edgefg.training.teacher import train_teacher
from tests.export.search.searching import HERE
from tests.synthetic import write_dataset

CONFIG = TrainingConfig(image_size=32, schedule=Schedule(epochs=1, batch_size=16))


@pytest.mark.parametrize("mix", ["cutmix", "snapmix"])
def test_distil_with_mixing(mix: str, birds_teacher: Path, two_birds: Path, tmp_path: Path) -> None:
    mixed = with_options(CONFIG, mix=mix)
    options: dict[str, Any] = {"student": "test_efficientnet", "weights": "none", "hardware": HERE}
    network, header = load(distill(birds_teacher, two_birds, tmp_path / "mixed", mixed, **options))
    assert header.training.augmentation.mix == mix
    plain, _ = load(distill(birds_teacher, two_birds, tmp_path / "plain", CONFIG, **options))
    weights = zip(network.parameters(), plain.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in weights)


TRANSFERS = [
    DistillationConfig(loss="dkd", dkd_beta=2.0),
    DistillationConfig(loss="dist"),
    DistillationConfig(feature_weight=1.0, attention_weight=1.0),
]


@pytest.mark.parametrize("distillation", TRANSFERS, ids=["dkd", "dist", "maps"])
def test_distil_with_every_loss(
    distillation: DistillationConfig, birds_teacher: Path, two_birds: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"student": "test_efficientnet", "weights": "none", "hardware": HERE}
    config = with_options(CONFIG, mix="mixup", mix_share=0.5)
    network, header = load(
        distill(birds_teacher, two_birds, tmp_path / "it", config, distillation=distillation, **options)
    )
    plain, _ = load(distill(birds_teacher, two_birds, tmp_path / "plain", config, **options))
    # A checkpoint of the student and nothing else: `load` is strict, and this is the plain one's set of tensors.
    assert network.state_dict().keys() == plain.state_dict().keys()
    weights = zip(network.parameters(), plain.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in weights)
    (stage,) = header.stages
    assert isinstance(stage, DistillStage)
    assert stage.distillation == distillation.resolved()
    assert stage.parents == (sha256(birds_teacher),)


def test_the_regressors_learn_and_a_cut_off_run_goes_on_with_them(
    birds_teacher: Path, two_birds: Path, tmp_path: Path
) -> None:
    made: list[DistillationObjective] = []

    class Spied(DistillationObjective):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.before: Any = copy.deepcopy(self.state_dict())
            made.append(self)
            self.left = stops.pop(0)

        def forward(self, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return super().forward(*args)

    config = with_options(CONFIG, epochs=2)
    options: dict[str, Any] = {"student": "test_efficientnet", "weights": "none", "hardware": HERE}
    options["distillation"] = DistillationConfig(feature_weight=1.0)
    steps = 3  # 36 images in batches of 16
    stops = [2 * steps, steps, steps]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgefg.export.distill.distill.DistillationObjective", Spied)
        whole = distill(birds_teacher, two_birds, tmp_path / "whole", config, **options)
        with pytest.raises(KeyboardInterrupt):
            distill(birds_teacher, two_birds, tmp_path / "cut", config, **options)
        resumed = distill(birds_teacher, two_birds, tmp_path / "cut", config, **options)
    assert all(not torch.equal(value, made[0].before[name]) for name, value in made[0].state_dict().items())
    for name, value in made[0].state_dict().items():
        assert torch.equal(value, made[2].state_dict()[name])
    pairs = zip(load(whole)[0].state_dict().values(), load(resumed)[0].state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many crops the teachers were asked about, each time."""
    asked: list[int] = []
    consult = DistillationObjective._run_teachers
    monkeypatch.setattr(
        DistillationObjective, "_run_teachers", lambda self, crops: (asked.append(len(crops)), consult(self, crops))[1]
    )
    return asked


def test_students_of_two_sizes_share_the_answers_to_one_set_of_crops(
    birds_teacher: Path, two_birds: Path, tmp_path: Path, asked: list[int]
) -> None:
    options: dict[str, Any] = {
        "student": "test_efficientnet",
        "weights": "none",
        "hardware": HERE,
        "distillation": DistillationConfig(teacher_size=40),
    }
    teacher_cache: dict[str, Any] = {"teacher_cache": tmp_path / "teacher_cache.bin"}
    first, second = CONFIG, with_options(CONFIG, image_size=24, epochs=CONFIG.schedule.epochs + 1)
    distill(birds_teacher, two_birds, tmp_path / "first", first, **options, **teacher_cache)
    known = sum(asked)
    kept = distill(birds_teacher, two_birds, tmp_path / "kept", second, **options, **teacher_cache)
    assert sum(asked) - known == known // CONFIG.schedule.epochs  # of the one epoch more alone
    anew = distill(birds_teacher, two_birds, tmp_path / "anew", second, **options)
    pairs = zip(load(kept)[0].state_dict().values(), load(anew)[0].state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_crops_that_come_again_are_asked_about_once(
    birds_teacher: Path, two_birds: Path, tmp_path: Path, asked: list[int]
) -> None:
    config = with_options(CONFIG, epochs=4, crop_epochs=2)
    distill(
        birds_teacher, two_birds, tmp_path / "s", config, student="test_efficientnet", weights="none", hardware=HERE,
        teacher_cache=tmp_path / "teacher_cache.bin",
    )  # fmt: skip
    assert sum(asked) == 2 * len(load_dataset(two_birds).splits["train"])


def test_answers_are_not_kept_of_mixed_images(birds_teacher: Path, two_birds: Path, tmp_path: Path) -> None:
    config = with_options(CONFIG, mix="mixup")
    with pytest.raises(DataError, match="--teacher-cache cannot be used with mixed images"):
        distill(
            birds_teacher, two_birds, tmp_path / "s", config, student="test_efficientnet", weights="none",
            hardware=HERE, teacher_cache=tmp_path / "teacher_cache.bin",
        )  # fmt: skip


def test_several_teachers_and_images_without_labels(birds_teacher: Path, two_birds: Path, tmp_path: Path) -> None:
    second = train_teacher(
        two_birds, tmp_path / "second", with_options(CONFIG, image_size=48), backbone="test_resnet",
        method="wsdan", options={"maps": 4}, weights="none", hardware=HERE,
    )  # fmt: skip
    wild = write_dataset(tmp_path / "wild", classes=3, per_class=5, size=40, seed=9)
    config = with_options(CONFIG, mix="cutmix")
    options: dict[str, Any] = {
        "student": "test_efficientnet",
        "weights": "none",
        "hardware": HERE,
        "extra_teachers": [second],
        "unlabelled": wild,
    }
    runs = [distill(birds_teacher, two_birds, tmp_path / name, config, **options) for name in "ab"]
    (network, header), (again, _) = map(load, runs)
    assert header.teacher == sha256(birds_teacher)
    (stage,) = header.stages
    assert isinstance(stage, DistillStage)
    assert stage.parents == (sha256(birds_teacher), sha256(second))
    assert stage.unlabelled is not None
    assert stage.unlabelled.count == 15
    # What later stages compare the data with is the labelled data alone.
    assert header.dataset == read_header(birds_teacher).dataset
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))


def test_extra_images_join_the_training_split_alone(
    birds_teacher: Path, two_birds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[ImageDataset] = []

    def spied(network: nn.Module, header: Header, data: ImageDataset, *args: Any, **others: Any) -> Path:
        trained.append(data)
        return tmp_path

    monkeypatch.setattr("edgefg.export.distill.distill.train_and_save", spied)
    wild = write_dataset(tmp_path / "wild", classes=2, per_class=5, size=40, seed=9)
    options: dict[str, Any] = {"student": "test_efficientnet", "weights": "none", "hardware": HERE}
    distill(birds_teacher, two_birds, tmp_path, CONFIG, **options)
    distill(birds_teacher, two_birds, tmp_path, CONFIG, unlabelled=wild, **options)
    without, joined = trained
    extra = joined.splits["train"][len(without.splits["train"]) :]
    assert [sample.path for sample in extra] == image_files(wild)
    assert {sample.label for sample in extra} == {UNLABELLED}
    assert (joined.splits["val"], joined.splits["test"]) == (without.splits["val"], without.splits["test"])
    with pytest.raises(DataError, match="--sampler balanced needs labels, which --unlabelled images do not have"):
        distill(
            birds_teacher, two_birds, tmp_path, with_options(CONFIG, sampler="balanced"), unlabelled=wild,
            **options,
        )  # fmt: skip


def test_distil_then_prune(birds_teacher: Path, two_birds: Path, tmp_path: Path) -> None:
    student = distill(
        birds_teacher, two_birds, tmp_path, CONFIG, student="test_efficientnet", weights="none", hardware=HERE
    )  # fmt: skip
    header = read_header(student)
    assert (header.kind, header.teacher) == ("student", sha256(birds_teacher))
    assert header.labels == read_header(birds_teacher).labels
    pruned = prune(
        student, two_birds, tmp_path, CONFIG, PruningConfig(macs=0.8, round_to=4), teacher_path=birds_teacher,
        hardware=HERE,
    )  # fmt: skip
    network, header = load(pruned)
    assert (header.kind, header.parent, header.teacher) == ("pruned", sha256(student), sha256(birds_teacher))
    assert header.channels
    assert header.validation is not None
    distilled, stage = header.stages
    assert isinstance(distilled, DistillStage)
    assert isinstance(stage, PruneStage)
    assert stage.pruning == PruningConfig(macs=0.8, round_to=4)
    assert stage.parents == (sha256(student), sha256(birds_teacher))
    assert stage.remaining is not None
    assert stage.remaining.macs <= 0.8
    before, _ = load(student)
    counts = [sum(p.numel() for p in model.parameters()) for model in (network, before)]
    assert counts[0] < counts[1]


@pytest.mark.parametrize("stage", ["distill", "prune"])
def test_boxes_of_parts_do_not_hold_back_the_augmentation(
    stage: str, birds_teacher: Path, two_birds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[ImageDataset] = []

    def spied(network: nn.Module, header: Header, data: ImageDataset, *args: Any, **others: Any) -> Path:
        trained.append(data)
        return tmp_path

    monkeypatch.setattr(f"edgefg.export.{stage}.{stage}.train_and_save", spied)
    if stage == "distill":
        distill(birds_teacher, two_birds, tmp_path, CONFIG, student="test_efficientnet", weights="none", hardware=HERE)
    else:
        prune(birds_teacher, two_birds, tmp_path, CONFIG, PruningConfig(macs=0.95, round_to=4), hardware=HERE)
    assert (two_birds / "boxes.csv").is_file()
    assert [data.boxes for data in trained] == [None]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("wsdan", {"maps": 4}),
        ("racnn", {"size2": 1.0, "size3": 1.0}),
        ("partrcnn", {"parts": "object,mark", "width": 16, "proposals": 10, "region_size": 0.5}),
        ("bcnn", {"projection": 8}),
        ("bcnn", {"pooling": "compact", "dimensions": 64, "streams": 2}),
        ("se", {}),
        ("cbam", {}),
    ],
)
def test_every_kind_of_teacher_distils_and_is_not_pruned(
    method: str, options: dict[str, object], two_birds: Path, tmp_path: Path
) -> None:
    teacher = train_teacher(
        two_birds, tmp_path, CONFIG, backbone="resnet10t", method=method, options=options, weights="none", hardware=HERE
    )
    student = distill(teacher, two_birds, tmp_path, CONFIG, student="test_efficientnet", weights="none", hardware=HERE)
    network, header = load(student)
    assert (header.method, header.teacher) == ("plain", sha256(teacher))
    assert header.validation is not None
    assert network(torch.zeros(1, 32, 32, 3, dtype=torch.uint8)).shape == (1, 2)
    with pytest.raises(DataError, match=f"is a {method} teacher, but only plain networks can be pruned"):
        prune(teacher, two_birds, tmp_path, CONFIG, hardware=HERE)
    artifact = tmp_path / "artifact"
    if not METHODS[method].single_pass:
        with pytest.raises(ExportError, match=f"is a {method} teacher, which looks at an image several times"):
            export_checkpoint(teacher, artifact, to="onnx", precision="fp32")
        assert not artifact.exists()


def test_wrong_data_and_targets(birds_teacher: Path, two_birds: Path, tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "other", classes=3, per_class=10, size=48, seed=2)
    with pytest.raises(DataError, match="has 3 classes, the checkpoint 2"):
        distill(birds_teacher, other, tmp_path, CONFIG, student="test_efficientnet", weights="none", hardware=HERE)
    with pytest.raises(DataError, match=r"--macs 1\.5 is out of range. Give a share between 0 and 1"):
        prune(birds_teacher, two_birds, tmp_path, CONFIG, PruningConfig(macs=1.5), hardware=HERE)
