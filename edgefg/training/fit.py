"""The one training loop: teacher, student and pruned student differ only in the loss they give it.

It runs on Lightning Fabric. After every epoch it writes its whole state (safetensors, no pickle), so that a run that
was killed resumes at the epoch it was in; since each epoch seeds itself, a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from edgefg import metrics
from edgefg.errors import TrainingError, one_line
from edgefg.preprocess import InputSpec
from edgefg.split import Sample
from edgefg.training.augment import EvaluationImages, TrainingImages, loader
from edgefg.training.history import History
from edgefg.training.recipe import Hardware, Recipe
from edgefg.training.resume import RunState, load_state, save_state

# (network, images uint8 [N, H, W, 3], labels int64 [N]) → (loss, logits)
Objective = Callable[[nn.Module, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def cross_entropy(label_smoothing: float) -> Objective:
    """Build the plain objective: cross entropy to the labels, smoothed (Szegedy et al. 2016, section 7)."""

    def objective(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = network(images)
        return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing), logits

    return objective


def fit(
    network: nn.Module,
    splits: dict[str, tuple[Sample, ...]],
    spec: InputSpec,
    recipe: Recipe,
    objective: Objective,
    out: Path,
    *,
    stage: str,
    fingerprint: str,
    head: nn.Module | None = None,
    hardware: Hardware | None = None,
    aides: Sequence[nn.Module] = (),
) -> metrics.Scores | None:
    """Train ``network`` in place and return its scores on ``val`` (None where that is empty).

    Args:
        network: takes ``uint8 [N, H, W, 3]``, gives logits.
        splits: ``train`` and ``val`` are used; ``test`` is never touched.
        spec: the evaluation preprocessing.
        recipe: the settings.
        objective: gives the loss of a batch.
        out: folder for ``<stage>.resume.safetensors``, ``<stage>.csv`` and TensorBoard's files.
        stage: name of the run's files, for instance ``teacher``.
        fingerprint: the data set's; a run resumes only on the same data.
        head: layer that learns ``recipe.head_lr_ratio`` times as fast.
        hardware: where to run.
        aides: frozen networks that the objective uses (a teacher), to be moved to the device.

    Raises:
        TrainingError: the loss is not finite, or ``out`` holds an unfinished run of another recipe.
    """
    hardware = hardware or Hardware()
    fabric = _launch(hardware)
    optimizer = torch.optim.AdamW(_groups(network, head, recipe), weight_decay=recipe.weight_decay)
    state = RunState(out / f"{stage}.resume.safetensors", recipe, fingerprint, stage)
    done = load_state(state, network, optimizer)
    network, optimizer = fabric.setup(network, optimizer)
    for aide in aides:
        aide.to(fabric.device).eval()
    training = TrainingImages(splits["train"], spec)
    history = History(out, stage, done, active=fabric.is_global_zero)
    scores = None
    try:
        for epoch in range(done, recipe.epochs):
            loss = _epoch(fabric, network, optimizer, training, objective, recipe, epoch, hardware.workers)
            scores = score(network, splits["val"], spec, recipe.batch_size, hardware.workers)
            history.add(epoch + 1, loss, _rate(recipe, (epoch + 1) / recipe.epochs), scores)
            if fabric.is_global_zero:
                save_state(state, network, optimizer, epoch + 1)
    finally:
        history.close()
    if scores is None:  # everything was done before the kill
        scores = score(network, splits["val"], spec, recipe.batch_size, hardware.workers)
    return scores


def score(
    network: nn.Module, samples: Sequence[Sample], spec: InputSpec, batch_size: int, workers: int
) -> metrics.Scores | None:
    """Score a network on samples with the runtime's preprocessing; None where there are none."""
    if not samples:
        return None
    logits, labels = predict(network, samples, spec, batch_size=batch_size, workers=workers)
    return metrics.score(logits, labels, classes=logits.shape[1])


@torch.inference_mode()
def predict(
    network: nn.Module, samples: Sequence[Sample], spec: InputSpec, *, batch_size: int = 32, workers: int = 1
) -> tuple[np.ndarray[Any, np.dtype[np.float32]], np.ndarray[Any, np.dtype[np.int64]]]:
    """Return the logits, ``float32 [N, classes]``, and labels, ``int64 [N]``, of samples in their order."""
    device = next(network.parameters()).device
    was_training = network.training
    network.eval()
    logits = [
        network(images.to(device)).float().cpu()
        for images, _ in loader(EvaluationImages(samples, spec), batch_size, workers=workers)
    ]
    network.train(was_training)
    return torch.cat(logits).numpy(), np.array([sample.label for sample in samples], np.int64)


def _epoch(
    fabric: Fabric,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    training: TrainingImages,
    objective: Objective,
    recipe: Recipe,
    epoch: int,
    workers: int,
) -> float:
    """Train one epoch and return its mean loss."""
    seed = recipe.seed * 100_003 + epoch
    torch.manual_seed(seed + 7919 * fabric.global_rank)
    share = (fabric.world_size, fabric.global_rank)
    batches = loader(training, recipe.batch_size, workers=workers, shuffle_seed=seed, share=share)
    batches = fabric.setup_dataloaders(batches, use_distributed_sampler=False)
    network.train()
    total = images_seen = 0.0
    bar = tqdm(batches, f"epoch {epoch + 1}/{recipe.epochs}", disable=None if fabric.is_global_zero else True)
    for step, (images, labels) in enumerate(bar):
        rate = _rate(recipe, (epoch + (step + 1) / len(batches)) / recipe.epochs)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["ratio"]
        loss, _ = objective(network, images, labels)
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss is {value} at epoch {epoch + 1}, step {step + 1};"
                " start again with a lower --lr and --restart"
            )
        optimizer.zero_grad(set_to_none=True)
        fabric.backward(loss)
        fabric.clip_gradients(network, optimizer, max_norm=recipe.clip_norm)
        optimizer.step()
        total += value * len(images)
        images_seen += len(images)
        bar.set_postfix(loss=f"{total / images_seen:.3f}", refresh=False)
    return total / images_seen


def _rate(recipe: Recipe, progress: float) -> float:
    """Learning rate at a share of all steps: linear warm-up, then half a cosine (Loshchilov & Hutter 2017)."""
    if progress < recipe.warmup:
        return recipe.lr * progress / recipe.warmup
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * (progress - recipe.warmup) / (1 - recipe.warmup)))


def _groups(network: nn.Module, head: nn.Module | None, recipe: Recipe) -> list[dict[str, Any]]:
    """Group the parameters: a new head learns faster; norms and biases do not decay."""
    heads = {id(p) for p in head.parameters()} if head is not None else set()
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in network.parameters():
        if parameter.requires_grad:
            groups.setdefault((id(parameter) in heads, parameter.ndim > 1), []).append(parameter)
    return [
        {
            "params": members,
            "lr": recipe.lr,
            "ratio": recipe.head_lr_ratio if is_head else 1.0,
            **({} if decays else {"weight_decay": 0.0}),
        }
        for (is_head, decays), members in groups.items()
    ]


def _launch(hardware: Hardware) -> Fabric:
    precision: Any = hardware.precision
    if precision == "auto":
        cuda = hardware.accelerator in ("auto", "cuda", "gpu") and torch.cuda.is_available()
        precision = ("bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed") if cuda else "32-true"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Fabric's advice on hardware that the caller chose
            fabric = Fabric(accelerator=hardware.accelerator, devices=hardware.devices, precision=precision)
            fabric.launch()
    except (RuntimeError, ValueError, TypeError) as exc:  # Fabric's misconfigurations come as any of these
        raise TrainingError(
            f"cannot train on {hardware.devices} × {hardware.accelerator!r} with precision {hardware.precision!r}:"
            f" {one_line(exc)[:200]}"
        ) from exc
    return fabric
