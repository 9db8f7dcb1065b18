"""The state of an unfinished run in one safetensors file: networks, objective, optimiser, loss scale and epoch."""

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
from edgefg.training.checkpoint import Header, read_header_json, run_difference, write_tensors


class UnfinishedRun(NamedTuple):
    """An unfinished run."""

    path: Path
    """File of its state."""
    header: Header
    """The header that its checkpoint will have. A run resumes only if `run_difference` finds no difference."""


class RunProgress(msgspec.Struct, frozen=True, kw_only=True):
    """Progress of a run."""

    epochs_done: int = 0
    best_epoch: int = 0
    """Counted from 1. 0: no best weights are kept."""
    best_top1: float = -1.0


class _State(msgspec.Struct, kw_only=True):
    header: Header
    progress: RunProgress
    precision: dict[str, int | float] = {}
    """State of Fabric's precision plugin: the loss scale of float16, empty otherwise."""


def save_state(
    run: UnfinishedRun,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    progress: RunProgress,
) -> None:
    """Write the state after an epoch atomically."""
    tensors = {
        f"{part}.{name}": tensor.detach().cpu().contiguous()
        for part, module in modules.items()
        for name, tensor in module.state_dict().items()
    }
    for index, slots in optimizer.state_dict()["state"].items():
        for slot, value in slots.items():
            if value is not None:
                tensors[f"optimizer.{index}.{slot}"] = torch.as_tensor(value).detach().cpu().contiguous()
    state = _State(header=run.header, progress=progress, precision=precision.state_dict())
    write_tensors(run.path, tensors, msgspec.json.encode(state).decode())


def load_state(
    run: UnfinishedRun, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer, precision: Precision
) -> RunProgress:
    """Load the state of an unfinished run into the other arguments, if there is one, and return its progress.

    Raises:
        TrainingError: the state is that of another run, was written by another version of edgefg, or is damaged.
    """
    if not run.path.exists():
        return RunProgress()
    advice = "Give another --out, or --restart to start again"
    try:
        state = msgspec.json.decode(read_header_json(run.path), type=_State)
        tensors = safetensors.torch.load_file(run.path)
    except msgspec.DecodeError as exc:
        raise TrainingError(
            f"{run.path} is an unfinished run of another version of edgefg, which cannot be resumed. {advice}"
        ) from exc
    except (CheckpointError, safetensors.SafetensorError) as exc:
        raise TrainingError(f"{run.path} cannot be resumed ({exc}). {advice}") from exc
    if difference := run_difference(state.header, run.header):
        raise TrainingError(f"{run.path} is an unfinished run with {difference}. {advice}")
    try:
        for part, module in modules.items():
            prefix = f"{part}."
            module.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
    except RuntimeError as exc:
        raise TrainingError(f"{run.path} holds a network of another shape. {advice}") from exc
    slots: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, slot = name.split(".", 2)
            slots.setdefault(int(index), {})[slot] = tensor
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    if state.precision and precision.state_dict():  # a run may go on in another precision
        precision.load_state_dict(state.precision)
    return state.progress
