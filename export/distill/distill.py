"""Distil: teachers → student, which learns to predict what they predict on identical crops.

    edgefg distill runs/x/teacher.safetensors DATA --student tf_efficientnet_lite0 --out runs/x

Several teachers are averaged, and images without labels may join the training. The default, KL divergence at T = 1, is
that of Beyer et al. 2022; the other losses are `edgefg.export.distill.losses`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from msgspec.structs import replace

from edgefg import __version__
from edgefg.data import ImageDataset, load_dataset
from edgefg.errors import DataError
from edgefg.export.distill.objective import Distillation, Teacher, open_teacher_cache, read_teachers
from edgefg.export.distill.unlabelled import Extra, read_extra
from edgefg.settings.distillation import DistillationConfig
from edgefg.settings.hardware import Hardware
from edgefg.settings.training import TrainingConfig
from edgefg.training.checkpoint import SCHEMA, Header
from edgefg.training.loop.stage import train_and_save
from edgefg.training.models.network import Network, NoOptions
from edgefg.training.weights import continue_whole, load_backbone, named


def distill(
    teacher_path: Path,
    data: Path | ImageDataset,
    out: Path,
    config: TrainingConfig,
    *,
    student: str,
    weights: str = "hub",
    distillation: DistillationConfig | None = None,
    also: Sequence[Path] = (),
    extra: Path | None = None,
    teacher_cache: Path | None = None,
    hardware: Hardware | None = None,
    skip_corrupt: bool = False,
    restart: bool = False,
) -> Path:
    """Train a student to predict what its teachers predict; return the path of ``out/student.safetensors``.

    Args:
        teacher_path: the teacher's checkpoint; the student takes over its labels, crop rule and split.
        data: the data it was trained on, as a path, or loaded by `load_dataset`.
        out: folder for the checkpoint and the run's files.
        config: the settings; ``image_size`` is the student's.
        student: backbone, a timm or torchvision name.
        weights: see `edgefg.training.weights.load_backbone`; of a plain checkpoint of the same backbone and classes the
            classifier is taken as well.
        distillation: what to learn; the defaults where left out.
        also: further teachers' checkpoints.
        extra: folder of images without labels that join the training images.
        teacher_cache: file in which the teachers' teacher_cache are kept for further runs that make the same crops.
        hardware: where to run.
        skip_corrupt: leave unreadable images out.
        restart: begin anew where an unfinished run lies in ``out``.

    Raises:
        CheckpointError, DataError, WeightsError, TrainingError: before the first step.
    """
    distillation = distillation or DistillationConfig()
    teachers = read_teachers([teacher_path, *also])
    first = teachers[0].header
    data = load_dataset(data, expected=first, skip_corrupt=skip_corrupt)
    unlabelled = None if extra is None else read_extra(extra, data, skip_corrupt=skip_corrupt)
    _, data = Network.prepare(NoOptions(), data)
    torch.manual_seed(config.schedule.seed)
    body, mean, std = load_backbone(student, len(data.labels), weights)
    size = config.image_size
    header = Header(
        schema=SCHEMA,
        kind="student",
        method="plain",
        backbone=student,
        labels=data.labels,
        taxonomy=data.taxonomy,
        input=replace(first.input, height=size, width=size),
        mean=mean,
        std=std,
        dataset=data.fingerprint,
        split=first.split,
        teacher=teachers[0].sha256,
        recipe=_described(student, weights, distillation, teachers[1:], unlabelled),
        edgefg=__version__,
    )
    network = Network(body, mean, std)
    whole = continue_whole(network, header, weights)
    kept = None if teacher_cache is None else open_teacher_cache(teacher_cache, teachers, distillation)
    return train_and_save(
        network,
        header,
        _joined(data, unlabelled, config),
        config,
        Distillation(teachers, network, config, distillation, kept),
        out,
        new_modules=() if whole else network.new_modules(),
        hardware=hardware,
        frozen_modules=[teacher.network for teacher in teachers],
        restart=restart,
    )


def _joined(data: ImageDataset, extra: Extra | None, config: TrainingConfig) -> ImageDataset:
    """Put the images without labels behind the training images; the fingerprint stays that of the labelled data."""
    if extra is None:
        return data
    if config.metric_learning.sampler != "shuffle":
        raise DataError(
            f"the sampler {config.metric_learning.sampler} goes by class, and extra images have none; take shuffle"
        )
    return replace(data, splits={**data.splits, "train": data.splits["train"] + extra.samples})


def _described(
    student: str, weights: str, distillation: DistillationConfig, others: Sequence[Teacher], extra: Extra | None
) -> str:
    """Say in one line, for the header, what the student was made from and how."""
    words = [f"distill {student} from {named(weights)}", *distillation.words()]
    words += [f"also teacher {other.sha256}" for other in others]
    if extra is not None:
        words.append(f"extra {len(extra.samples)} images {extra.fingerprint}")
    return ", ".join(words)
