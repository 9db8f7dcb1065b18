"""The optimiser of a run: its parameter groups, learning rates over depth and time, and what is frozen at first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from edgefg.settings.training import Recipe


def optimizer_of(
    network: nn.Module, fresh: Sequence[nn.Module], recipe: Recipe, objective: nn.Module | None = None
) -> torch.optim.Optimizer:
    """Build the recipe's optimiser; parameters of ``fresh`` learn ``recipe.head_lr_ratio`` times as fast.

    So do those of the ``objective``, where it has any.
    """
    groups = _groups(network, fresh, recipe, [] if objective is None else list(objective.parameters()))
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay)
    return torch.optim.AdamW(groups, weight_decay=recipe.weight_decay)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share of a learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["ratio"]


def rate_at(recipe: Recipe, progress: float) -> float:
    """Learning rate at a share of all steps: linear warm-up, then half a cosine (Loshchilov & Hutter 2017)."""
    if progress < recipe.warmup:
        return recipe.lr * progress / recipe.warmup
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * (progress - recipe.warmup) / (1 - recipe.warmup)))


def thaw(network: nn.Module, fresh: Sequence[nn.Module], recipe: Recipe, epoch: int) -> None:
    """Freeze what does not learn yet in an epoch (from 0); see `freeze`.

    Gradual unfreezing (Howard & Ruder 2018): after ``recipe.freeze_epochs``, the blocks begin to learn from the last
    one to the first, in equal parts over ``recipe.thaw_epochs``, after which all do.
    """
    since, over = epoch - recipe.freeze_epochs, recipe.thaw_epochs
    if since >= over:
        freeze(network, fresh, False)
        return
    first = max(depths(network).values())
    # The last block often is the head, which learns already: the block before it is thawed with it.
    freeze(network, fresh, True, 0 if since < 0 else 1 + math.ceil(first * (since + 1) / (over + 1)))


def freeze(network: nn.Module, fresh: Sequence[nn.Module], frozen: bool, thawed: int = 0) -> None:
    """Freeze or thaw everything but ``fresh`` and the last ``thawed`` blocks; frozen batch norms keep their statistics.

    Call it after ``network.train()``, which would set the norms learning again. Blocks are those of `depths`.
    """
    own = {id(module) for root in fresh for module in root.modules()}
    parameters = {id(parameter) for root in fresh for parameter in root.parameters()}
    depth = depths(network) if thawed else {}
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(not frozen or id(parameter) in parameters or depth.get(name, thawed) < thawed)
    if frozen:
        for module in network.modules():
            learns = id(module) in own or any(parameter.requires_grad for parameter in module.parameters())
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and not learns:
                module.eval()


def _groups(
    network: nn.Module, fresh: Sequence[nn.Module], recipe: Recipe, beside: Sequence[nn.Parameter]
) -> list[dict[str, Any]]:
    """Group the parameters by learning rate; norms and biases do not decay."""
    new = {id(parameter) for root in fresh for parameter in root.parameters()}
    depth = depths(network)
    rate = float(getattr(network, "fresh_rate", 1.0))
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            ratio = recipe.head_lr_ratio * rate if id(parameter) in new else recipe.layer_decay ** depth[name]
            groups.setdefault((ratio, parameter.ndim > 1), []).append(parameter)
    for parameter in beside:
        groups.setdefault((recipe.head_lr_ratio, parameter.ndim > 1), []).append(parameter)
    return [
        {
            "params": members,
            "lr": recipe.lr,
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
