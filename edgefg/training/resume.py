"""The state of an unfinished run: network, optimiser and epoch in one safetensors file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import safetensors.torch
import torch
from torch import nn

from edgefg.errors import CheckpointError, TrainingError
from edgefg.training.checkpoint import read_header_json, write_tensors
from edgefg.training.recipe import Recipe


class RunState(NamedTuple):
    """Where a run keeps its state, and what must be equal for it to be resumed."""

    path: Path
    recipe: Recipe
    fingerprint: str
    stage: str


class _Saved(msgspec.Struct, kw_only=True):
    recipe: Recipe
    fingerprint: str
    stage: str
    epochs_done: int


def save_state(state: RunState, network: nn.Module, optimizer: torch.optim.Optimizer, epochs_done: int) -> None:
    """Write the state after an epoch, whole or not at all."""
    tensors = {f"network.{name}": tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    for index, slots in optimizer.state_dict()["state"].items():
        for slot, value in slots.items():
            tensors[f"optimizer.{index}.{slot}"] = torch.as_tensor(value).detach().cpu().contiguous()
    saved = _Saved(recipe=state.recipe, fingerprint=state.fingerprint, stage=state.stage, epochs_done=epochs_done)
    write_tensors(state.path, tensors, msgspec.json.encode(saved).decode())


def load_state(state: RunState, network: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load an unfinished run's state, if there is one; return how many epochs are done.

    Raises:
        TrainingError: the state is of another recipe or other data, or it is broken.
    """
    if not state.path.exists():
        return 0
    advice = "give another --out, or --restart to begin anew"
    try:
        saved = msgspec.json.decode(read_header_json(state.path), type=_Saved)
        tensors = safetensors.torch.load_file(state.path)
    except (CheckpointError, msgspec.DecodeError, safetensors.SafetensorError) as exc:
        raise TrainingError(f"{state.path} cannot be resumed ({exc}); {advice}") from exc
    if saved.stage != state.stage or saved.fingerprint != state.fingerprint or saved.recipe != state.recipe:
        raise TrainingError(f"{state.path} is an unfinished run {_difference(saved, state)}; {advice}")
    weights = {name.removeprefix("network."): t for name, t in tensors.items() if name.startswith("network.")}
    try:
        network.load_state_dict(weights)
    except RuntimeError as exc:
        raise TrainingError(f"{state.path} holds a network of another shape; {advice}") from exc
    slots: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, slot = name.split(".", 2)
            slots.setdefault(int(index), {})[slot] = tensor
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    return saved.epochs_done


def _difference(saved: _Saved, state: RunState) -> str:
    for field in msgspec.structs.fields(Recipe):
        old, new = getattr(saved.recipe, field.name), getattr(state.recipe, field.name)
        if old != new:
            return f"with {field.name}={old}, now {new}"
    return "on other data, of another teacher or parent, or from other weights"
