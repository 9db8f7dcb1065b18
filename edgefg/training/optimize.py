"""The optimiser of a run: its parameter groups, learning rates over depth and time, and what is frozen at first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from edgefg.training.recipe import Recipe


def optimizer_of(network: nn.Module, fresh: Sequence[nn.Module], recipe: Recipe) -> torch.optim.Optimizer:
    """Build the recipe's optimiser; parameters of ``fresh`` learn ``recipe.head_lr_ratio`` times as fast."""
    groups = _groups(network, fresh, recipe)
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


def freeze(network: nn.Module, fresh: Sequence[nn.Module], frozen: bool) -> None:
    """Freeze or thaw everything but ``fresh``; frozen batch norms keep their statistics.

    Call it after ``network.train()``, which would set the norms learning again.
    """
    own = {id(module) for root in fresh for module in root.modules()}
    parameters = {id(parameter) for root in fresh for parameter in root.parameters()}
    for parameter in network.parameters():
        parameter.requires_grad_(not frozen or id(parameter) in parameters)
    if frozen:
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and id(module) not in own:
                module.eval()


def _groups(network: nn.Module, fresh: Sequence[nn.Module], recipe: Recipe) -> list[dict[str, Any]]:
    """Group the parameters by learning rate; norms and biases do not decay."""
    new = {id(parameter) for root in fresh for parameter in root.parameters()}
    depth = depths(network)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            ratio = recipe.head_lr_ratio if id(parameter) in new else recipe.layer_decay ** depth[name]
            groups.setdefault((ratio, parameter.ndim > 1), []).append(parameter)
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

    A block is a child of the backbone, or of one of its sequences of blocks, in the order in which they are defined:
    what layer-wise decay of the learning rate (Howard & Ruder 2018, discriminative fine-tuning) counts.
    """
    backbone: nn.Module = getattr(network, "backbone", network)
    blocks: list[str] = []
    for name, child in backbone.named_children():
        inner = list(child.named_children()) if isinstance(child, nn.Sequential) else []
        names = [f"{name}.{key}" for key, _ in inner] or [name]
        blocks += [block for block in names if any(True for _ in backbone.get_submodule(block).parameters())]
    index = {f"backbone.{block}.": position for position, block in enumerate(blocks)}
    prefixes = index if backbone is not network else {key.removeprefix("backbone."): i for key, i in index.items()}
    last = max(len(blocks) - 1, 0)
    return {
        name: last - next((i for prefix, i in prefixes.items() if name.startswith(prefix)), last)
        for name, _ in network.named_parameters()
    }
