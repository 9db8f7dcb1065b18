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
from edgefg.data.load import FolderData, data_of
from edgefg.errors import DataError
from edgefg.export.distill.objective import Distillation, Teacher, answers_in, read_teachers
from edgefg.export.distill.unlabelled import Extra, read_extra
from edgefg.settings.training import Hardware, Recipe, Transfer
from edgefg.training.checkpoint import SCHEMA, Header
from edgefg.training.loop.stage import train_and_save
from edgefg.training.models.network import Network, NoOptions
from edgefg.training.weights import continue_whole, load_backbone, named


def distill(
    teacher_path: Path,
    data: Path | FolderData,
    out: Path,
    recipe: Recipe,
    *,
    student: str,
    weights: str = "hub",
    transfer: Transfer | None = None,
    also: Sequence[Path] = (),
    extra: Path | None = None,
    answers: Path | None = None,
    hardware: Hardware | None = None,
    skip_corrupt: bool = False,
    restart: bool = False,
) -> Path:
    """Train a student to predict what its teachers predict; return the path of ``out/student.safetensors``.

    Args:
        teacher_path: the teacher's checkpoint; the student takes over its labels, crop rule and split.
        data: the data it was trained on, as a path, or as `load_data` returned them.
        out: folder for the checkpoint and the run's files.
        recipe: the settings; ``image_size`` is the student's.
        student: backbone, a timm or torchvision name.
        weights: see `edgefg.training.weights.load_backbone`; of a plain checkpoint of the same backbone and classes the
            classifier is taken as well.
        transfer: what to learn; the defaults where left out.
        also: further teachers' checkpoints.
        extra: folder of images without labels that join the training images.
        answers: file in which the teachers' answers are kept for further runs that make the same crops.
        hardware: where to run.
        skip_corrupt: leave unreadable images out.
        restart: begin anew where an unfinished run lies in ``out``.

    Raises:
        CheckpointError, DataError, WeightsError, TrainingError: before the first step.
    """
    transfer = transfer or Transfer()
    teachers = read_teachers([teacher_path, *also])
    first = teachers[0].header
    data = data_of(data, first, skip_corrupt=skip_corrupt)
    unlabelled = None if extra is None else read_extra(extra, data, skip_corrupt=skip_corrupt)
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
        input=replace(first.input, height=size, width=size),
        mean=mean,
        std=std,
        dataset=data.fingerprint,
        split=first.split,
        teacher=teachers[0].sha256,
        recipe=_described(student, weights, transfer, teachers[1:], unlabelled),
        edgefg=__version__,
    )
    network = Network(body, mean, std)
    whole = continue_whole(network, header, weights)
    kept = None if answers is None else answers_in(answers, teachers, transfer)
    return train_and_save(
        network,
        header,
        _joined(data, unlabelled, recipe),
        recipe,
        Distillation(teachers, network, recipe, transfer, kept),
        out,
        fresh=() if whole else network.fresh(),
        hardware=hardware,
        aides=[teacher.network for teacher in teachers],
        restart=restart,
    )


def _joined(data: FolderData, extra: Extra | None, recipe: Recipe) -> FolderData:
    """Put the images without labels behind the training images; the fingerprint stays that of the labelled data."""
    if extra is None:
        return data
    if recipe.sampler != "shuffle":
        raise DataError(f"the sampler {recipe.sampler} goes by class, and extra images have none; take shuffle")
    return replace(data, splits={**data.splits, "train": data.splits["train"] + extra.samples})


def _described(student: str, weights: str, transfer: Transfer, others: Sequence[Teacher], extra: Extra | None) -> str:
    """Say in one line, for the header, what the student was made from and how."""
    words = [f"distill {student} from {named(weights)}", *transfer.words()]
    words += [f"also teacher {other.sha256}" for other in others]
    if extra is not None:
        words.append(f"extra {len(extra.samples)} images {extra.fingerprint}")
    return ", ".join(words)
