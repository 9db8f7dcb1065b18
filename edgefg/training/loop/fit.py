"""The training loop. Teachers, students and pruned students differ only in the objective that they give it.

It runs on Lightning Fabric. After every epoch it saves its whole state (safetensors, no pickle), so that a killed run
resumes at the epoch in which it stopped. Every epoch seeds the random numbers itself: a resumed run therefore gives the
same result as an uninterrupted one.
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

from edgefg import metrics
from edgefg.data import ImageDataset
from edgefg.data.split import Sample
from edgefg.errors import EdgefgError, HardwareError, TrainingError, one_line
from edgefg.preprocess import InputSpec
from edgefg.progress import track
from edgefg.settings.hardware import Hardware
from edgefg.settings.training import TrainingConfig
from edgefg.training.allocator import keep_freed_memory
from edgefg.training.checkpoint import Header
from edgefg.training.data.augment import EvaluationImages, TrainingImages
from edgefg.training.data.loader import evaluation_loader, training_loader
from edgefg.training.loop.finite import layers_stay_finite
from edgefg.training.loop.history import History
from edgefg.training.loop.optimizer import create_optimizer, lr_at, set_lr, unfreeze
from edgefg.training.loop.resume import RunProgress, UnfinishedRun, load_state, save_state
from edgefg.training.models.network import Batch, TrainableNetwork
from edgefg.training.objective import Objective


def fit(
    network: TrainableNetwork,
    header: Header,
    data: ImageDataset,
    objective: Objective,
    out: Path,
    *,
    new_modules: Sequence[nn.Module] = (),
    hardware: Hardware | None = None,
    frozen_modules: Sequence[nn.Module] = (),
) -> metrics.Scores | None:
    """Train a network in place and return its scores on ``val``, or None if there are no validation images.

    Args:
        network: the network.
        header: the run: its settings, the network's input and, as ``kind``, the name of the run's files.
        data: ``train`` and ``val`` are used. ``test`` is never touched.
        objective: loss of a batch. Its own parameters, if it has any, are trained too.
        out: folder for ``<kind>.resume.safetensors``, ``<kind>.csv`` and the TensorBoard log.
        new_modules: untrained modules, whose learning rate is multiplied by ``head_lr_ratio``.
        hardware: where to run.
        frozen_modules: networks that the objective uses (a teacher). They are moved to the device, and not trained.

    Raises:
        TrainingError: the loss, its gradients or the logits are not finite, or ``out`` holds an unfinished run with
            other settings.
        HardwareError: there is no such accelerator, or it lacks the precision.
    """
    hardware, config = hardware or Hardware(), header.training
    schedule = config.schedule
    keep_freed_memory()
    fabric = _launch(hardware)
    # Before the optimiser is created: its resumed state goes to the device of the parameters.
    network.to(fabric.device)
    modules = {"network": network, "objective": objective.to(fabric.device)}
    optimizer = create_optimizer(network, new_modules, config, objective)
    run = UnfinishedRun(out / f"{header.kind}.resume.safetensors", header)
    if schedule.ema:
        average = get_ema_multi_avg_fn(schedule.ema)  # type: ignore[no-untyped-call]
        modules["ema"] = AveragedModel(network, multi_avg_fn=average, use_buffers=True)
    if schedule.patience:
        modules["best"] = copy.deepcopy(network)
    progress = load_state(run, modules, optimizer, fabric.strategy.precision)
    wrapped, optimizer = fabric.setup(network, optimizer)
    for method in network.forward_methods:
        wrapped.mark_forward_method(method)
    for module in frozen_modules:
        module.to(fabric.device).eval()
    loop = _Loop(fabric, wrapped, network, optimizer, objective, config, new_modules, modules)
    history = History(out, header.kind, progress.epochs_done, active=fabric.is_global_zero)
    scores = None
    try:
        while not _is_over(progress, config, network):
            size = objective.crop_size(config.size_at(progress.epochs_done))
            spec = replace(header.input, height=size, width=size)
            training = TrainingImages(data.splits["train"], spec, config.augmentation, data.boxes)
            loss = loop.epoch(training, progress, hardware.workers, run.path)
            done = progress.epochs_done + 1
            scores = None
            if done % schedule.val_every == 0 or done == schedule.epochs:
                scores = loop.score(data.splits["val"], header.input, progress, hardware.workers, run.path)
            progress = loop.finish_epoch(progress, scores)
            history.add(progress.epochs_done, loss, lr_at(schedule, progress.epochs_done / schedule.epochs), scores)
            if fabric.is_global_zero:
                save_state(run, modules, optimizer, fabric.strategy.precision, progress)
    finally:
        history.close()
    result = modules["best"] if progress.best_epoch else loop.result()
    if result is not network:
        network.load_state_dict(result.state_dict())
    network.requires_grad_(True)
    if scores is None or result is not loop.result():
        scores = score(network, data.splits["val"], header.input, schedule.batch_size, hardware.workers)
    return scores


def _is_over(progress: RunProgress, config: TrainingConfig, network: TrainableNetwork) -> bool:
    schedule = config.schedule
    # Only epochs that were scored, and in which the classifiers learned, count against the patience.
    scored = progress.epochs_done - progress.epochs_done % schedule.val_every
    since = [e for e in range(progress.best_epoch, scored) if network.classifies_in(e, schedule.epochs)]
    stopped_early = schedule.patience and progress.best_epoch and len(since) >= schedule.patience
    return progress.epochs_done >= schedule.epochs or bool(stopped_early)


def score(
    network: nn.Module, samples: Sequence[Sample], spec: InputSpec, batch_size: int, workers: int
) -> metrics.Scores | None:
    """Score a network with the preprocessing of the runtime. Returns None if there are no samples."""
    if not samples:
        return None
    logits, labels = predict(network, samples, spec, batch_size=batch_size, workers=workers)
    return metrics.score(logits, labels, classes=logits.shape[1])


@torch.inference_mode()
def predict(
    network: nn.Module, samples: Sequence[Sample], spec: InputSpec, *, batch_size: int = 32, workers: int = 1
) -> tuple[np.ndarray[Any, np.dtype[np.float32]], np.ndarray[Any, np.dtype[np.int64]]]:
    """Return the logits, ``float32 [N, classes]``, and the labels, ``int64 [N]``, of samples in their order."""
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
    """The parts of a run that stay the same from epoch to epoch."""

    fabric: Fabric
    wrapped: nn.Module
    """``network``, wrapped by Fabric."""
    network: TrainableNetwork
    optimizer: torch.optim.Optimizer
    objective: Objective
    config: TrainingConfig
    new_modules: Sequence[nn.Module]
    modules: dict[str, nn.Module]

    def result(self) -> nn.Module:
        """Return the network to score and keep: the moving average if there is one."""
        ema = self.modules.get("ema")
        return self.network if ema is None else cast(nn.Module, ema.module)

    def finish_epoch(self, progress: RunProgress, scores: metrics.Scores | None) -> RunProgress:
        """Count an epoch. With early stopping, keep the weights if they are the best so far."""
        done = progress.epochs_done + 1
        if self.config.schedule.patience and scores is not None and scores.top1 > progress.best_top1:
            self.modules["best"].load_state_dict(self.result().state_dict())
            return RunProgress(epochs_done=done, best_epoch=done, best_top1=scores.top1)
        return replace(progress, epochs_done=done)

    def share_gradients(self) -> None:
        """Average the gradients of the objective's parameters over the processes.

        Fabric does this for the network only.
        """
        if self.fabric.world_size > 1:
            for parameter in self.objective.parameters():
                self.fabric.all_reduce(parameter.grad)

    def epoch(self, training: TrainingImages, progress: RunProgress, workers: int, state: Path) -> float:
        """Train for one epoch and return the mean loss."""
        epoch, config, fabric = progress.epochs_done, self.config, self.fabric
        epochs, seed = config.schedule.epochs, config.crop_seed(epoch)
        torch.manual_seed(seed + 7919 * fabric.global_rank)
        process = (fabric.world_size, fabric.global_rank)
        batches = training_loader(training, config, workers=workers, seed=seed, process=process)
        batches = fabric.setup_dataloaders(batches, use_distributed_sampler=False)
        self.wrapped.train()
        unfreeze(self.network, self.new_modules, config.fine_tuning, epoch)
        self.network.begin_epoch(epoch, epochs)
        total = images_seen = 0.0
        shown = track(batches, f"epoch {epoch + 1}/{epochs}", len(batches)) if fabric.is_global_zero else batches
        for step, batch in enumerate(shown):
            set_lr(self.optimizer, lr_at(config.schedule, (epoch + (step + 1) / len(batches)) / epochs))
            try:
                value = self.step(batch)
            except _NotFiniteError as exc:
                place = f"epoch {epoch + 1}, step {step + 1}"
                raise TrainingError(_not_finite(str(exc), place, epoch, batch, training, state)) from exc.__cause__
            total += value * len(batch.images)
            images_seen += len(batch.images)
        return total / images_seen

    def loss_is_scaled(self) -> bool:
        """Whether a gradient scaler is active, as for float16. It skips steps whose gradients overflow."""
        scaler = getattr(self.fabric.strategy.precision, "scaler", None)  # only some of Fabric's plugins have one
        # With a scale below 1, the scale is not the cause of the overflow.
        return scaler is not None and scaler.get_scale() >= 1

    def step(self, batch: Batch) -> float:
        """Train on a batch and return its loss.

        Raises:
            _NotFiniteError: the loss or its gradients are not finite, or an error followed from such numbers.
        """
        # First: gradients of the batch before must not be taken for this one's.
        self.optimizer.zero_grad(set_to_none=True)
        try:
            # On a single device, Fabric runs the methods that an objective calls in full precision.
            with self.fabric.autocast():
                loss, _ = self.objective(self.wrapped, batch)
            value = float(loss.item())
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
        except Exception as exc:  # a method may fail in any way on numbers that are not finite
            with self.fabric.autocast():
                if layers_stay_finite(self.network, lambda: self.objective(self.network, batch)):
                    raise
            raise _NotFiniteError(f"a layer's output is not finite ({one_line(exc)[:120]})") from exc
        if "ema" in self.modules:
            cast(AveragedModel, self.modules["ema"]).update_parameters(self.network)
        return value

    def score(
        self, samples: Sequence[Sample], spec: InputSpec, progress: RunProgress, workers: int, state: Path
    ) -> metrics.Scores | None:
        """Score the network after the epoch that follows ``progress.epochs_done``.

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
                f"a layer's output on val is not finite after epoch {epoch + 1} ({one_line(exc)[:120]})."
                f" {_last_good(epoch, state)}. Start again with a lower --lr and --restart"
            ) from exc


class _NotFiniteError(Exception):
    """Numbers of a step are not finite; the message says which."""


def _not_finite(what: str, place: str, epoch: int, batch: Batch, training: TrainingImages, state: Path) -> str:
    indices = [] if batch.indices is None else batch.indices.tolist()
    files = [str(training.samples[index].path) for index in indices]
    return (
        f"{what} at {place}, in the batch {', '.join(files)}. {_last_good(epoch, state)}."
        " Look at these images, or start again with a lower --lr and --restart"
    )


def _last_good(epoch: int, state: Path) -> str:
    return f"{state} holds the run after epoch {epoch}" if epoch else "No epoch was finished"


def _launch(hardware: Hardware) -> Fabric:
    precision: Any = hardware.precision
    if precision == "auto":
        cuda = hardware.accelerator in ("auto", "cuda", "gpu") and torch.cuda.is_available()
        # Without emulation: a T4 or V100 emulates bfloat16, and is far faster in float16.
        native = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = ("bf16-mixed" if native else "16-mixed") if cuda else "32-true"
    # The plain strategy would wait for the gradients of parameters that are frozen for a while.
    strategy = "ddp_find_unused_parameters_true" if hardware.devices > 1 else "auto"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Fabric's advice on hardware that the caller chose
            fabric = Fabric(
                accelerator=hardware.accelerator, devices=hardware.devices, precision=precision, strategy=strategy
            )
            fabric.launch()
    except (RuntimeError, ValueError, TypeError) as exc:  # Fabric reports misconfiguration as any of these
        raise HardwareError(
            f"cannot train on {hardware.devices} × {hardware.accelerator!r} with precision {hardware.precision!r}:"
            f" {one_line(exc)[:200]}"
        ) from exc
    return fabric
