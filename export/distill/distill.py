"""Distillation: a student learns to predict what its teachers predict for the same crops.

    edgefg distill runs/x/teacher.safetensors DATA --student tf_efficientnet_lite0 --out runs/x

The predictions of several teachers are averaged, and images without labels may join the training. The default loss, KL
divergence at T = 1, follows Beyer et al. 2022. `edgefg.export.distill.losses` has the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from msgspec.structs import replace

from edgefg import __version__
from edgefg.artifact.stages import DistillStage, UnlabelledImages, versions_of
from edgefg.data import ImageDataset, load_dataset
from edgefg.errors import DataError
from edgefg.export.distill.objective import DistillationObjective, load_teachers, open_teacher_cache
from edgefg.export.distill.unlabelled import UnlabelledSamples, read_unlabelled
from edgefg.settings.distillation import DistillationConfig
from edgefg.settings.hardware import Hardware
from edgefg.settings.training import TrainingConfig
from edgefg.training.checkpoint import SCHEMA, Header
from edgefg.training.loop.stage import train_and_save
from edgefg.training.models.network import Network, NoOptions
from edgefg.training.weights import describe_weights, load_backbone, load_whole_checkpoint


def distill(
    teacher_path: Path,
    data: Path | ImageDataset,
    out: Path,
    config: TrainingConfig,
    *,
    student: str,
    weights: str = "hub",
    distillation: DistillationConfig | None = None,
    extra_teachers: Sequence[Path] = (),
    unlabelled: Path | None = None,
    teacher_cache: Path | None = None,
    hardware: Hardware | None = None,
    skip_corrupt: bool = False,
    restart: bool = False,
) -> Path:
    """Train a student to predict what its teachers predict. Returns the path of ``out/student.safetensors``.

    Args:
        teacher_path: checkpoint of the teacher. The student has its labels, crop rule and split.
        data: the data that the teacher was trained on: a path, or loaded data.
        out: folder for the checkpoint and the run's files.
        config: training settings. ``image_size`` is the student's.
        student: backbone, a timm or torchvision name.
        weights: see `edgefg.training.weights.load_backbone`. From a plain checkpoint of the same backbone and classes
            the classifier is loaded too.
        distillation: what to learn from the teachers.
        extra_teachers: checkpoints of further teachers.
        unlabelled: folder of images without labels that join the training images.
        teacher_cache: file that keeps the teachers' logits for runs with the same crops.
        hardware: where to run.
        skip_corrupt: leave unreadable images out instead of raising.
        restart: start again even if ``out`` holds an unfinished run.

    Raises:
        CheckpointError, DataError, WeightsError, TrainingError: before the first step.
    """
    distillation = (distillation or DistillationConfig()).resolved()
    teachers = load_teachers([teacher_path, *extra_teachers])
    first = teachers[0].header
    data = load_dataset(data, expected=first, skip_corrupt=skip_corrupt)
    extra = None if unlabelled is None else read_unlabelled(unlabelled, data, skip_corrupt=skip_corrupt)
    _, data = Network.prepare(NoOptions(), data)
    torch.manual_seed(config.schedule.seed)
    body, mean, std = load_backbone(student, len(data.labels), weights)
    stage = DistillStage(
        backbone=student,
        weights=describe_weights(weights),
        training=config,
        distillation=distillation,
        unlabelled=None if extra is None else UnlabelledImages(count=len(extra.samples), fingerprint=extra.fingerprint),
        parents=tuple(teacher.sha256 for teacher in teachers),
        versions=versions_of("torch", "timm"),
    )
    header = Header(
        schema=SCHEMA,
        kind="student",
        method="plain",
        backbone=student,
        labels=data.labels,
        taxonomy=data.taxonomy,
        input=replace(first.input, height=config.image_size, width=config.image_size),
        mean=mean,
        std=std,
        dataset=data.fingerprint,
        split=first.split,
        teacher=teachers[0].sha256,
        stages=(stage,),
        edgefg=__version__,
    )
    network = Network(body, mean, std)
    whole = load_whole_checkpoint(network, header, weights)
    cache = None if teacher_cache is None else open_teacher_cache(teacher_cache, teachers, distillation)
    return train_and_save(
        network,
        header,
        _with_unlabelled(data, extra, config),
        DistillationObjective(teachers, network, config, distillation, cache),
        out,
        new_modules=() if whole else network.new_modules(),
        hardware=hardware,
        frozen_modules=[teacher.network for teacher in teachers],
        restart=restart,
    )


def _with_unlabelled(data: ImageDataset, extra: UnlabelledSamples | None, config: TrainingConfig) -> ImageDataset:
    """Append images without labels to the training images. The fingerprint stays that of the labelled data."""
    if extra is None:
        return data
    sampler = config.metric_learning.sampler
    if sampler != "shuffle":
        raise DataError(f"--sampler {sampler} needs labels, which --unlabelled images do not have. Use shuffle")
    return replace(data, splits={**data.splits, "train": data.splits["train"] + extra.samples})
