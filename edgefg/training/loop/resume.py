"""The state of an unfinished run: networks, losses with a memory, optimiser, scale, epoch in one safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import safetensors.torch
import torch
from lightning_fabric.plugins import Precision
from torch import nn

from edgefg.errors import CheckpointError, TrainingError
from edgefg.settings.options import options_of
from edgefg.settings.training import TrainingConfig
from edgefg.training.checkpoint import read_header_json, write_tensors


class Run(NamedTuple):
    """Where a run keeps its state, and what must be equal for it to be resumed."""

    path: Path
    config: TrainingConfig
    fingerprint: str
    stage: str


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a run is."""

    epochs_done: int = 0
    best_epoch: int = 0
    """Counted from 1; 0: none is kept."""
    best_top1: float = -1.0


class _Saved(msgspec.Struct, kw_only=True):
    config: TrainingConfig
    fingerprint: str
    stage: str
    progress: Progress
    precision: dict[str, int | float] = {}
    """Of Fabric's plugin: in float16 the scale of the loss; else nothing."""


def save_state(
    run: Run,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    progress: Progress,
) -> None:
    """Write the state after an epoch, whole or not at all."""
    tensors = {
        f"{part}.{name}": tensor.detach().cpu().contiguous()
        for part, module in modules.items()
        for name, tensor in module.state_dict().items()
    }
    for index, slots in optimizer.state_dict()["state"].items():
        for slot, value in slots.items():
            if value is not None:
                tensors[f"optimizer.{index}.{slot}"] = torch.as_tensor(value).detach().cpu().contiguous()
    saved = _Saved(
        config=run.config,
        fingerprint=run.fingerprint,
        stage=run.stage,
        progress=progress,
        precision=precision.state_dict(),
    )
    write_tensors(run.path, tensors, msgspec.json.encode(saved).decode())


def load_state(
    run: Run, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer, precision: Precision
) -> Progress:
    """Load an unfinished run's state, if there is one, into the other arguments; return how far it is.

    Raises:
        TrainingError: the state is of another config or other data, or it is broken.
    """
    if not run.path.exists():
        return Progress()
    advice = "give another --out, or --restart to begin anew"
    try:
        saved = msgspec.json.decode(read_header_json(run.path), type=_Saved)
        tensors = safetensors.torch.load_file(run.path)
    except (CheckpointError, msgspec.DecodeError, safetensors.SafetensorError) as exc:
        raise TrainingError(f"{run.path} cannot be resumed ({exc}); {advice}") from exc
    if saved.stage != run.stage or saved.fingerprint != run.fingerprint or saved.config != run.config:
        raise TrainingError(f"{run.path} is an unfinished run {_difference(saved, run)}; {advice}")
    try:
        for part, module in modules.items():
            prefix = f"{part}."
            module.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
    except RuntimeError as exc:
        raise TrainingError(f"{run.path} holds a network of another shape; {advice}") from exc
    slots: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, slot = name.split(".", 2)
            slots.setdefault(int(index), {})[slot] = tensor
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    if saved.precision and precision.state_dict():  # a run may go on in another precision
        precision.load_state_dict(saved.precision)
    return saved.progress


def _difference(saved: _Saved, run: Run) -> str:
    for option in options_of(TrainingConfig).values():
        old, new = option.value_in(saved.config), option.value_in(run.config)
        if old != new:
            return f"with {option.flag} {old}, now {new}"
    return "on other data, of another teacher or parent, or from other weights"
