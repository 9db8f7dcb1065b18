"""The optimiser of a run: its parameter groups, learning rates over depth and time, and what is frozen at first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from edgefg.settings.training import Schedule, TrainingConfig


def optimizer_of(
    network: nn.Module, new_modules: Sequence[nn.Module], config: TrainingConfig, objective: nn.Module | None = None
) -> torch.optim.Optimizer:
    """Build the config's optimiser; parameters of ``fresh`` learn ``config.fine_tuning.head_lr_ratio`` times as fast.

    So do those of the ``objective``, where it has any.
    """
    groups = _groups(network, new_modules, config, [] if objective is None else list(objective.parameters()))
    if config.schedule.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True, weight_decay=config.schedule.weight_decay)
    return torch.optim.AdamW(groups, weight_decay=config.schedule.weight_decay)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share of a learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["ratio"]


def rate_at(schedule: Schedule, progress: float) -> float:
    """Learning rate at a share of all steps: linear warm-up, then half a cosine (Loshchilov & Hutter 2017)."""
    if progress < schedule.warmup:
        return schedule.lr * progress / schedule.warmup
    return schedule.lr * 0.5 * (1 + math.cos(math.pi * (progress - schedule.warmup) / (1 - schedule.warmup)))


def unfreeze(network: nn.Module, new_modules: Sequence[nn.Module], config: TrainingConfig, epoch: int) -> None:
    """Freeze what does not learn yet in an epoch (from 0); see `freeze`.

    Gradual unfreezing (Howard & Ruder 2018): after ``freeze_epochs`` the blocks are unfrozen from the last to the
    first, evenly over ``unfreeze_epochs``.
    """
    since, over = epoch - config.fine_tuning.freeze_epochs, config.fine_tuning.unfreeze_epochs
    if since >= over:
        freeze(network, new_modules, False)
        return
    first = max(depths(network).values())
    # The last block often is the head, which learns already: the block before it is unfrozen with it.
    freeze(network, new_modules, True, 0 if since < 0 else 1 + math.ceil(first * (since + 1) / (over + 1)))


def freeze(network: nn.Module, new_modules: Sequence[nn.Module], frozen: bool, unfrozen: int = 0) -> None:
    """Freeze or unfreeze all but ``new_modules`` and the last ``unfrozen`` blocks; frozen norms keep their statistics.

    Call it after ``network.train()``, which would set the norms learning again. Blocks are those of `depths`.
    """
    own = {id(module) for root in new_modules for module in root.modules()}
    parameters = {id(parameter) for root in new_modules for parameter in root.parameters()}
    depth = depths(network) if unfrozen else {}
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(not frozen or id(parameter) in parameters or depth.get(name, unfrozen) < unfrozen)
    if frozen:
        for module in network.modules():
            learns = id(module) in own or any(parameter.requires_grad for parameter in module.parameters())
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and not learns:
                module.eval()


def _groups(
    network: nn.Module, new_modules: Sequence[nn.Module], config: TrainingConfig, beside: Sequence[nn.Parameter]
) -> list[dict[str, Any]]:
    """Group the parameters by learning rate; norms and biases do not decay."""
    new = {id(parameter) for root in new_modules for parameter in root.parameters()}
    depth = depths(network)
    rate = float(getattr(network, "new_module_lr_ratio", 1.0))
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            ratio = (
                config.fine_tuning.head_lr_ratio * rate
                if id(parameter) in new
                else config.fine_tuning.layer_decay ** depth[name]
            )
            groups.setdefault((ratio, parameter.ndim > 1), []).append(parameter)
    for parameter in beside:
        groups.setdefault((config.fine_tuning.head_lr_ratio, parameter.ndim > 1), []).append(parameter)
    return [
        {
            "params": members,
            "lr": config.schedule.lr,
            "ratio": ratio,
            **({} if decays else {"weight_decay": 0.0}),
        }
        for (ratio, decays), members in groups.items()
    ]


def depths(network: nn.Module) -> dict[str, int]:
    """Return for every parameter how many blocks lie between it and the output (0: the last block).

    What layer-wise decay of the learning rate (Howard & Ruder 2018, discriminative fine-tuning) counts. The blocks are
    the backbone's, and those of every copy of it that a method has; what a method adds to it counts as the last block.
    """
    backbone: nn.Module = getattr(network, "backbone", network)
    levels = _levels(backbone)
    last = max(levels.values(), default=0)
    depth = {name: 0 for name, _ in network.named_parameters()}
    for prefix, module in network.named_modules():
        if [name for name, _ in module.named_parameters()] == list(levels):
            depth |= {f"{prefix}.{name}" if prefix else name: last - level for name, level in levels.items()}
    return depth


def _levels(backbone: nn.Module) -> dict[str, int]:
    """Number the blocks from the input, and give every parameter its block's number.

    A block is a child of the backbone, or of one of its sequences, in the order in which they are defined; a norm by
    itself belongs to the block before it, and what lies in no block (a position embedding) to the first one. (timm's
    group_matcher goes by names, which a method that puts gates in changes, and torchvision has none.)
    """
    children = [
        (f"{name}.{key}", block)
        for name, child in backbone.named_children()
        for key, block in (child.named_children() if isinstance(child, nn.Sequential) else [("", child)])
    ]
    level, levels = -1, {name: 0 for name, _ in backbone.named_parameters()}
    for name, block in children:
        parameters = dict(block.named_parameters(name.rstrip(".")))
        level += any(parameter.ndim > 1 for parameter in parameters.values())
        levels |= {inner: max(level, 0) for inner in parameters}
    return levels
