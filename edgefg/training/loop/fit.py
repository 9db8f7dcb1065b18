"""The one training loop: teacher, student and pruned student differ only in the loss they give it.

It runs on Lightning Fabric. After every epoch it writes its whole state (safetensors, no pickle), so that a run that
was killed resumes at the epoch it was in; since each epoch seeds itself, a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from lightning_fabric import Fabric
from msgspec.structs import replace
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from edgefg import metrics
from edgefg.data.split import Sample
from edgefg.errors import EdgefgError, HardwareError, TrainingError, one_line
from edgefg.preprocess import InputSpec
from edgefg.settings.hardware import Hardware
from edgefg.settings.training import TrainingConfig
from edgefg.training.data.augment import Boxes, EvaluationImages, TrainingImages
from edgefg.training.data.loader import evaluation_loader, training_loader
from edgefg.training.loop.allocator import keep_freed_memory
from edgefg.training.loop.finite import layers_stay_finite
from edgefg.training.loop.history import History
from edgefg.training.loop.optimizer import optimizer_of, rate_at, set_rate, unfreeze
from edgefg.training.loop.resume import Progress, Run, load_state, save_state
from edgefg.training.models.network import Batch
from edgefg.training.objective import Objective

# What an objective may call of the wrapped network besides itself.
_FORWARD_METHODS = ("loss", "logits_and_maps")


def fit(
    network: nn.Module,
    splits: dict[str, tuple[Sample, ...]],
    spec: InputSpec,
    config: TrainingConfig,
    objective: Objective,
    out: Path,
    *,
    stage: str,
    fingerprint: str,
    new_modules: Sequence[nn.Module] = (),
    boxes: Boxes | None = None,
    hardware: Hardware | None = None,
    frozen_modules: Sequence[nn.Module] = (),
) -> metrics.Scores | None:
    """Train ``network`` in place and return its scores on ``val`` (None where that is empty).

    Args:
        network: takes ``uint8 [N, H, W, 3]``, gives logits.
        splits: ``train`` and ``val`` are used; ``test`` is never touched.
        spec: the evaluation preprocessing.
        config: the settings.
        objective: gives the loss of a batch. Where it is an ``nn.Module``, its own parameters learn along.
        out: folder for ``<stage>.resume.safetensors``, ``<stage>.csv`` and TensorBoard's files.
        stage: name of the run's files, for instance ``teacher``.
        fingerprint: the data set's; a run resumes only on the same data.
        new_modules: modules that start untrained and learn ``config.fine_tuning.head_lr_ratio`` times as fast.
        boxes: part boxes of the training images, for objectives that use them.
        hardware: where to run.
        frozen_modules: frozen networks that the objective uses (a teacher), to be moved to the device.

    Raises:
        TrainingError: the loss, its gradients or the logits are not finite, or ``out`` holds an unfinished run of
            another config.
    """
    hardware = hardware or Hardware()
    keep_freed_memory()
    fabric = _launch(hardware)
    # First of all, since a resumed optimiser's state goes where the parameters are.
    network.to(fabric.device)
    modules = {"network": network}
    if isinstance(objective, nn.Module):
        modules["objective"] = objective.to(fabric.device)
    optimizer = optimizer_of(network, new_modules, config, modules.get("objective"))
    run = Run(out / f"{stage}.resume.safetensors", config, fingerprint, stage)
    if config.schedule.ema:
        average = get_ema_multi_avg_fn(config.schedule.ema)  # type: ignore[no-untyped-call]
        modules["ema"] = AveragedModel(network, multi_avg_fn=average, use_buffers=True)
    if config.schedule.patience:
        modules["best"] = copy.deepcopy(network)
    progress = load_state(run, modules, optimizer, fabric.strategy.precision)
    wrapped, optimizer = fabric.setup(network, optimizer)
    for method in _FORWARD_METHODS:
        if hasattr(network, method):
            wrapped.mark_forward_method(method)
    for module in frozen_modules:
        module.to(fabric.device).eval()
    loop = _Loop(fabric, wrapped, network, optimizer, objective, config, new_modules, modules)
    history = History(out, stage, progress.epochs_done, active=fabric.is_global_zero)
    scores = None
    try:
        while not _is_over(progress, config, network):
            size = _crop_size(config, objective, progress.epochs_done)
            training = TrainingImages(
                splits["train"], replace(spec, height=size, width=size), config.augmentation, boxes
            )
            loss = loop.epoch(training, progress, hardware.workers, run.path)
            done = progress.epochs_done + 1
            scores = None
            if done % config.schedule.val_every == 0 or done == config.schedule.epochs:
                scores = loop.score(splits["val"], spec, progress, hardware.workers, run.path)
            progress = loop.note(progress, scores)
            history.add(
                progress.epochs_done,
                loss,
                rate_at(config.schedule, progress.epochs_done / config.schedule.epochs),
                scores,
            )
            if fabric.is_global_zero:
                save_state(run, modules, optimizer, fabric.strategy.precision, progress)
    finally:
        history.close()
    result = modules["best"] if progress.best_epoch else loop.result()
    if result is not network:
        network.load_state_dict(result.state_dict())
    network.requires_grad_(True)
    if scores is None or result is not loop.result():
        scores = score(network, splits["val"], spec, config.schedule.batch_size, hardware.workers)
    return scores


def _crop_size(config: TrainingConfig, objective: Objective, epoch: int) -> int:
    """Return the size of an epoch's crops: the network's, or a larger one that the objective needs for others."""
    size = config.size_at(epoch)
    return cast(Any, objective).crop_size(size) if hasattr(objective, "crop_size") else size


def _is_over(progress: Progress, config: TrainingConfig, network: nn.Module) -> bool:
    # Epochs that were not scored cannot have been better or worse.
    scored = progress.epochs_done - progress.epochs_done % config.schedule.val_every
    since: Sequence[int] = range(progress.best_epoch, scored)
    if hasattr(network, "classifies_in"):
        # Nor can those whose classifiers did not learn: a schedule may begin with many of them.
        since = [epoch for epoch in since if cast(Any, network).classifies_in(epoch, config.schedule.epochs)]
    return progress.epochs_done >= config.schedule.epochs or bool(
        config.schedule.patience and progress.best_epoch and len(since) >= config.schedule.patience
    )


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
        for images, _ in evaluation_loader(EvaluationImages(samples, spec), batch_size, workers=workers)
    ]
    network.train(was_training)
    return torch.cat(logits).numpy(), np.array([sample.label for sample in samples], np.int64)


class _Loop(NamedTuple):
    """What an epoch works with."""

    fabric: Fabric
    wrapped: nn.Module
    network: nn.Module
    optimizer: torch.optim.Optimizer
    objective: Objective
    config: TrainingConfig
    new_modules: Sequence[nn.Module]
    modules: dict[str, nn.Module]

    def result(self) -> nn.Module:
        """Return the network that counts: the averaged one where there is one."""
        ema = self.modules.get("ema")
        return self.network if ema is None else cast(nn.Module, ema.module)

    def note(self, progress: Progress, scores: metrics.Scores | None) -> Progress:
        """Count an epoch, and keep the weights where they are the best so far and early stopping is on."""
        done = progress.epochs_done + 1
        if self.config.schedule.patience and scores is not None and scores.top1 > progress.best_top1:
            self.modules["best"].load_state_dict(self.result().state_dict())
            return Progress(epochs_done=done, best_epoch=done, best_top1=scores.top1)
        return replace(progress, epochs_done=done)

    def share_gradients(self) -> None:
        """Average over the processes the gradients of what the objective itself learns: only the network is wrapped."""
        if self.fabric.world_size > 1 and "objective" in self.modules:
            for parameter in self.modules["objective"].parameters():
                self.fabric.all_reduce(parameter.grad)

    def epoch(self, training: TrainingImages, progress: Progress, workers: int, state: Path) -> float:
        """Train one epoch and return its mean loss."""
        epoch, config, fabric = progress.epochs_done, self.config, self.fabric
        seed = config.crop_seed(epoch)
        torch.manual_seed(seed + 7919 * fabric.global_rank)
        share = (fabric.world_size, fabric.global_rank)
        batches = training_loader(training, config, workers=workers, seed=seed, share=share)
        batches = fabric.setup_dataloaders(batches, use_distributed_sampler=False)
        self.wrapped.train()
        unfreeze(self.network, self.new_modules, config, epoch)
        if hasattr(self.network, "begin_epoch"):
            cast(Any, self.network).begin_epoch(epoch, config.schedule.epochs)
        total = images_seen = 0.0
        bar = tqdm(
            batches, f"epoch {epoch + 1}/{config.schedule.epochs}", disable=None if fabric.is_global_zero else True
        )
        for step, batch in enumerate(bar):
            set_rate(
                self.optimizer, rate_at(config.schedule, (epoch + (step + 1) / len(batches)) / config.schedule.epochs)
            )
            try:
                value = self.step(batch)
            except _NotFiniteError as exc:
                place = f"epoch {epoch + 1}, step {step + 1}"
                raise TrainingError(_not_finite(str(exc), place, epoch, batch, training, state)) from exc.__cause__
            total += value * len(batch.images)
            images_seen += len(batch.images)
            bar.set_postfix(loss=f"{total / images_seen:.3f}", refresh=False)
        return total / images_seen

    def loss_is_scaled(self) -> bool:
        """Whether a scaler enlarged the loss, as for float16: where gradients overflow it skips the step and halves."""
        scaler = getattr(self.fabric.strategy.precision, "scaler", None)
        # Below 1 it is not the scale that they overflow by.
        return scaler is not None and scaler.get_scale() >= 1

    def step(self, batch: Batch) -> float:
        """Learn from a batch and return its loss.

        Raises:
            _NotFiniteError: the loss or its gradients are not finite, or what layers gave was not and that raised.
        """
        # First of all: what a batch before this one left is not to be taken for this one's.
        self.optimizer.zero_grad(set_to_none=True)
        try:
            # On one device Fabric leaves the methods that an objective calls in full precision.
            with self.fabric.autocast():
                loss, _ = self.objective(self.wrapped, batch)
            value = loss.item()
            if not math.isfinite(value):
                raise _NotFiniteError(f"the loss is {value}")
            self.fabric.backward(loss)
            self.share_gradients()
            norm = self.fabric.clip_gradients(
                self.wrapped, self.optimizer, max_norm=self.config.schedule.clip_norm, error_if_nonfinite=False
            )
            if not math.isfinite(norm) and not self.loss_is_scaled():
                raise _NotFiniteError("the norm of the gradients is not finite")
            self.optimizer.step()
        except (_NotFiniteError, EdgefgError):
            raise
        except Exception as exc:  # a method may fail on such numbers in any way
            with self.fabric.autocast():
                if layers_stay_finite(self.network, lambda: self.objective(self.network, batch)):
                    raise
            raise _NotFiniteError(f"what the layers give is not finite ({one_line(exc)[:120]})") from exc
        if "ema" in self.modules:
            cast(AveragedModel, self.modules["ema"]).update_parameters(self.network)
        return value

    def score(
        self, samples: Sequence[Sample], spec: InputSpec, progress: Progress, workers: int, state: Path
    ) -> metrics.Scores | None:
        """Score the network that counts after one more epoch than ``progress`` has.

        Raises:
            TrainingError: its logits are not finite.
        """
        network, size = self.result(), self.config.schedule.batch_size
        try:
            return score(network, samples, spec, size, workers)
        except EdgefgError:
            raise
        except Exception as exc:  # as in a step
            if layers_stay_finite(network, lambda: predict(network, samples, spec, batch_size=size, workers=workers)):
                raise
            epoch = progress.epochs_done
            raise TrainingError(
                f"what the layers give on val is not finite after epoch {epoch + 1} ({one_line(exc)[:120]});"
                f" {_last_good(epoch, state)}; start again with a lower --lr and --restart"
            ) from exc


class _NotFiniteError(Exception):
    """A step lost its numbers; the message says which."""


def _not_finite(what: str, place: str, epoch: int, batch: Batch, training: TrainingImages, state: Path) -> str:
    """Say where the numbers were lost: step, the batch's files, the last good state."""
    indices = [] if batch.indices is None else batch.indices.tolist()
    files = [str(training.samples[index].path) for index in indices]
    return (
        f"{what} at {place}; the batch: {', '.join(files)}; {_last_good(epoch, state)};"
        " look at these images, or start again with a lower --lr and --restart"
    )


def _last_good(epoch: int, state: Path) -> str:
    return f"{state} holds the run after epoch {epoch}" if epoch else "no epoch was finished"


def _launch(hardware: Hardware) -> Fabric:
    precision: Any = hardware.precision
    if precision == "auto":
        cuda = hardware.accelerator in ("auto", "cuda", "gpu") and torch.cuda.is_available()
        # Not as torch emulates it: a T4 or V100 is far quicker in float16, which it has.
        native = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = ("bf16-mixed" if native else "16-mixed") if cuda else "32-true"
    # Where parameters are frozen for a while, the plain strategy would wait for their gradients.
    strategy = "ddp_find_unused_parameters_true" if hardware.devices > 1 else "auto"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Fabric's advice on hardware that the caller chose
            fabric = Fabric(
                accelerator=hardware.accelerator, devices=hardware.devices, precision=precision, strategy=strategy
            )
            fabric.launch()
    except (RuntimeError, ValueError, TypeError) as exc:  # Fabric's misconfigurations come as any of these
        raise HardwareError(
            f"cannot train on {hardware.devices} × {hardware.accelerator!r} with precision {hardware.precision!r}:"
            f" {one_line(exc)[:200]}"
        ) from exc
    return fabric
