"""The optimiser: parameter groups, learning rates by depth and by step, and freezing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from edgefg.settings.training import FineTuning, Schedule, TrainingConfig
from edgefg.training.models.network import TrainableNetwork


def create_optimizer(
    network: TrainableNetwork,
    new_modules: Sequence[nn.Module],
    config: TrainingConfig,
    objective: nn.Module | None = None,
) -> torch.optim.Optimizer:
    """Create the optimiser of a run.

    Parameters of ``new_modules`` and of the objective have a learning rate ``head_lr_ratio`` times as high.
    """
    decay = config.schedule.weight_decay
    groups = _groups(network, new_modules, config, [] if objective is None else list(objective.parameters()))
    if config.schedule.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True, weight_decay=decay)
    return torch.optim.AdamW(groups, weight_decay=decay)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group, ``lr`` times the group's ratio."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["ratio"]


def lr_at(schedule: Schedule, progress: float) -> float:
    """Return the learning rate after a share of all steps: linear warm-up, then cosine (Loshchilov & Hutter 2017)."""
    if progress < schedule.warmup:
        return schedule.lr * progress / schedule.warmup
    return schedule.lr * 0.5 * (1 + math.cos(math.pi * (progress - schedule.warmup) / (1 - schedule.warmup)))


def unfreeze(network: TrainableNetwork, new_modules: Sequence[nn.Module], fine_tuning: FineTuning, epoch: int) -> None:
    """Freeze the blocks that are not trained yet in an epoch (counted from 0), see `freeze`.

    Gradual unfreezing (Howard & Ruder 2018): after ``freeze_epochs`` the blocks are unfrozen from the last to the
    first, evenly over ``unfreeze_epochs``.
    """
    since, over = epoch - fine_tuning.freeze_epochs, fine_tuning.unfreeze_epochs
    if since >= over:
        freeze(network, new_modules, False)
        return
    deepest = max(layer_depths(network).values())
    # The last block often is the head, which is trained already: unfreeze the block before it at the same time.
    trained = 0 if since < 0 else 1 + math.ceil(deepest * (since + 1) / (over + 1))
    freeze(network, new_modules, True, trained)


def freeze(network: TrainableNetwork, new_modules: Sequence[nn.Module], frozen: bool, trained_blocks: int = 0) -> None:
    """Freeze, or unfreeze, all but ``new_modules`` and the last ``trained_blocks`` blocks of `layer_depths`.

    Frozen batch norms keep their statistics. Call it after ``network.train()``, which would update them again.
    """
    own = {id(module) for root in new_modules for module in root.modules()}
    parameters = {id(parameter) for root in new_modules for parameter in root.parameters()}
    depth = layer_depths(network) if trained_blocks else {}
    for name, parameter in network.named_parameters():
        trained = not frozen or id(parameter) in parameters or depth.get(name, trained_blocks) < trained_blocks
        parameter.requires_grad_(trained)
    if frozen:
        for module in network.modules():
            trained = id(module) in own or any(parameter.requires_grad for parameter in module.parameters())
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and not trained:
                module.eval()


def _groups(
    network: TrainableNetwork,
    new_modules: Sequence[nn.Module],
    config: TrainingConfig,
    of_objective: Sequence[nn.Parameter],
) -> list[dict[str, Any]]:
    """Group the parameters by learning rate and weight decay; norms and biases have no weight decay."""
    fine_tuning = config.fine_tuning
    new = {id(parameter) for root in new_modules for parameter in root.parameters()}
    depth = layer_depths(network)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            ratio = fine_tuning.layer_decay ** depth[name]
            if id(parameter) in new:
                ratio = fine_tuning.head_lr_ratio * network.new_module_lr_ratio
            groups.setdefault((ratio, parameter.ndim > 1), []).append(parameter)
    for parameter in of_objective:
        groups.setdefault((fine_tuning.head_lr_ratio, parameter.ndim > 1), []).append(parameter)
    return [
        {
            "params": members,
            "lr": config.schedule.lr,
            "ratio": ratio,
            **({} if decays else {"weight_decay": 0.0}),
        }
        for (ratio, decays), members in groups.items()
    ]


def layer_depths(network: TrainableNetwork) -> dict[str, int]:
    """Return for every parameter the number of blocks between it and the output (0: the last block).

    Layer-wise decay of the learning rate (discriminative fine-tuning, Howard & Ruder 2018) counts them. The blocks are
    those of the backbone, and of every copy of it that a method has. Modules that a method adds count as the last
    block.
    """
    levels = _levels(network.layers_root())
    last = max(levels.values(), default=0)
    depth = {name: 0 for name, _ in network.named_parameters()}
    for prefix, module in network.named_modules():
        if [name for name, _ in module.named_parameters()] == list(levels):
            depth |= {f"{prefix}.{name}" if prefix else name: last - level for name, level in levels.items()}
    return depth


def _levels(backbone: nn.Module) -> dict[str, int]:
    """Number the blocks from the input, and return the block number of every parameter.

    A block is a child of the backbone, or of one of its ``nn.Sequential`` children, in the order of definition. A norm
    by itself belongs to the block before it, and a parameter outside all blocks (a position embedding) to the first.
    timm's ``group_matcher`` goes by names, which a method that inserts modules changes, and torchvision has none.
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
