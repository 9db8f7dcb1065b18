"""Distil: teacher → student, by the KL divergence of their predictions on identical crops.

edgefg distill runs/x/teacher.safetensors DATA --student tf_efficientnet_lite0 --out runs/x
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import torch
from torch import nn
from torch.nn import functional as F

from edgefg import __version__
from edgefg.errors import DataError
from edgefg.manifest import sha256
from edgefg.recipe import Hardware, Recipe
from edgefg.training.checkpoint import SCHEMA, Header, load
from edgefg.training.data import load_data
from edgefg.training.losses import cross_entropy
from edgefg.training.mix import Mixer, mixer_of
from edgefg.training.models.network import Batch, Network, NoOptions
from edgefg.training.objective import Objective
from edgefg.training.stage import train_and_save
from edgefg.training.weights import load_backbone


def distill(
    teacher_path: Path,
    data_root: Path,
    out: Path,
    recipe: Recipe,
    *,
    student: str,
    weights: str = "hub",
    temperature: float = 1.0,
    hard_weight: float = 0.0,
    hardware: Hardware | None = None,
    skip_corrupt: bool = False,
    restart: bool = False,
) -> Path:
    """Train a student to predict what the teacher predicts; return the path of ``out/student.safetensors``.

    Args:
        teacher_path: the teacher's checkpoint; the student takes over its labels, crop rule and split.
        data_root: the data it was trained on.
        out: folder for the checkpoint and the run's files.
        recipe: the settings; ``image_size`` is the student's.
        student: backbone, a timm or torchvision name.
        weights: see `edgefg.training.weights.load_backbone`.
        temperature: see `distillation`.
        hard_weight: see `distillation`.
        hardware: where to run.
        skip_corrupt: leave unreadable images out.
        restart: begin anew where an unfinished run lies in ``out``.

    Raises:
        CheckpointError, DataError, WeightsError, TrainingError: before the first step.
    """
    teacher, teacher_header = load(teacher_path)
    if not (temperature > 0 and 0 <= hard_weight <= 1):
        raise DataError(
            f"--temperature {temperature:g} or --hard-weight {hard_weight:g} is out of range: > 0, and 0 to 1"
        )
    data = load_data(data_root, teacher_header.split, skip_corrupt=skip_corrupt, like=teacher_header)
    _, data = Network.prepare(NoOptions(), data)
    torch.manual_seed(recipe.seed)
    body, mean, std = load_backbone(student, len(data.labels), weights)
    size = recipe.image_size
    header = Header(
        schema=SCHEMA,
        kind="student",
        method="plain",
        backbone=student,
        labels=data.labels,
        taxonomy=data.taxonomy,
        input=msgspec.structs.replace(teacher_header.input, height=size, width=size),
        mean=mean,
        std=std,
        dataset=data.fingerprint,
        split=teacher_header.split,
        teacher=sha256(teacher_path),
        recipe=f"distill {student} from {weights}, T={temperature:g}, hard={hard_weight:g}",
        edgefg=__version__,
    )
    network = Network(body, mean, std)
    objective = distillation(
        teacher,
        teacher_header,
        temperature=temperature,
        hard_weight=hard_weight,
        smoothing=recipe.label_smoothing,
        mix=mixer_of(recipe, network, len(data.labels)),
    )
    return train_and_save(
        network,
        header,
        data,
        recipe,
        objective,
        out,
        fresh=network.fresh(),
        hardware=hardware,
        aides=[teacher],
        restart=restart,
    )


def distillation(
    teacher: nn.Module,
    teacher_header: Header,
    *,
    temperature: float,
    hard_weight: float,
    smoothing: float,
    mix: Mixer | None = None,
) -> Objective:
    """Build the distillation loss (Hinton et al. 2015; identical crops, mixed alike: Beyer et al. 2022).

    ``(1 - hard_weight)·T²·KL(softmax(teacher/T) ‖ softmax(student/T)) + hard_weight·CE(labels)``. A teacher of another
    input size sees the very same crop, resized. ``mix`` mixes a batch before either sees it.
    """
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    size = (teacher_header.input.height, teacher_header.input.width)

    criterion = cross_entropy(smoothing)

    def objective(student: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        if mix is not None:
            batch = mix(student, batch)
        logits = student(batch.images)
        with torch.no_grad():
            wanted = teacher(_resized(batch.images, size))
        # In float32: the logarithm of a softmax in half precision loses the small probabilities that matter here.
        loss = (1 - hard_weight) * kl_divergence(logits.float(), wanted.float(), temperature)
        if hard_weight:
            loss = loss + hard_weight * criterion(logits, batch)
        return loss, logits

    return objective


def kl_divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return T²·KL(softmax(teacher/T) ‖ softmax(student/T)), mean over the batch, of ``float32 [N, C]`` logits."""
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher / temperature, dim=1)
    return F.kl_div(log_student, log_teacher, log_target=True, reduction="batchmean") * temperature**2


def _resized(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize ``[N, H, W, 3]``, ``uint8`` or float levels, to the teacher's size, as float levels."""
    if tuple(images.shape[1:3]) == size:
        return images
    planes = images.permute(0, 3, 1, 2).float()
    return F.interpolate(planes, size, mode="bilinear", antialias=True).permute(0, 2, 3, 1)
