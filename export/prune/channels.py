"""Removal of channels: importance, ranking, and the limits of every layer.

torch-pruning finds which channels must be removed together, and ranks them (Fang et al. 2023, "DepGraph"). The limit
per layer, the rounding, first-order Taylor importance and the geometric median are implemented here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch_pruning
from torch import nn

from edgefg.artifact.stages import RelativeCost
from edgefg.errors import ExportError
from edgefg.export.prune.cost import CostModel
from edgefg.log import get_logger
from edgefg.quiet import quiet
from edgefg.settings.pruning import PruningConfig
from edgefg.training.models.backbone import head_of
from edgefg.training.models.network import Network

_log = get_logger(__name__)

# Each step removes 2 % of the ranked channels, so that the step that reaches the target ends near it.
_STEPS = 48
_LAST_RATIO = 0.96
# Pruning functions that remove a channel along the first dimension of all parameters of a layer.
_OUTPUTS = (
    torch_pruning.prune_conv_out_channels,
    torch_pruning.prune_depthwise_conv_out_channels,
    torch_pruning.prune_linear_out_channels,
    torch_pruning.prune_batchnorm_out_channels,
    torch_pruning.prune_groupnorm_out_channels,
    torch_pruning.prune_layernorm_out_channels,
)


def remove_channels(
    network: Network,
    pruning: PruningConfig,
    cost_model: CostModel,
    share: float,
    fill_gradients: Callable[[Network], None],
) -> RelativeCost:
    """Remove channels in place, the least important first, until a share of the target cost is left.

    Importance is computed again before every step. The first step that reaches the target is the last one: the network
    ends at or below the target, in evaluation mode.

    Args:
        network: the unpruned network, or one that was pruned before. Limits count from the unpruned widths.
        pruning: the settings.
        cost_model: computes costs relative to the unpruned network.
        share: the share of the target cost to keep, relative to the unpruned network.
        fill_gradients: fills the gradients of the parameters. Only Taylor importance uses them.

    Returns:
        The remaining costs.

    Raises:
        ExportError: every layer is at its limit before the target is reached, or no layer has what the importance
            needs.
    """
    cost, _ = pruning.target()
    pruner = _Pruner(network, cost_model, pruning)
    left = cost_model.relative_cost(network.eval())
    while left.of(cost) > share and not pruner.exhausted:
        if pruning.importance == "taylor":
            network.zero_grad()
            fill_gradients(network)
            network.eval()
        if pruner.advance():
            left = cost_model.relative_cost(network)
            _log.info("left: %s", left.render())
    if left.of(cost) <= share:
        return left
    if pruner.ranked is False:
        raise ExportError(f"--importance {pruning.importance} does not apply to any layer. Use another one")
    raise ExportError(
        f"{left.render()} are left when {pruning.max_ratio:.0%} of each layer's channels are removed, in multiples of"
        f" {pruning.round_to}, but --{cost} {share:g} was asked for. Raise --max-ratio, lower --round-to or raise"
        f" --{cost}"
    )


class _Pruner(torch_pruning.pruner.BasePruner):  # type: ignore[misc]
    """torch-pruning's ranking, with a limit and a rounding that hold for every layer at every step.

    The library itself stops at a layer only after the limit was exceeded, however far one step went. When it rounds, it
    counts the channels of grouped convolutions by group in one place and together in another.

    Its share of removed channels grows from step to step, and counts from the first step although layers at their limit
    leave the ranking. It would therefore remove nothing for many steps, and then nearly all channels of the other
    layers. Here every step removes the same share of the ranked channels. Only with ``uniform`` the share grows.

    Attributes:
        ranked: whether any layer had a score. None: all layers are at their limit.
        exhausted: whether a further step would change nothing.
    """

    def __init__(self, network: Network, cost_model: CostModel, pruning: PruningConfig) -> None:
        body = network.backbone
        self.ranked: bool | None = None
        self.exhausted = False
        self._idle = 0
        self._settings = pruning
        self._scores: dict[nn.Module, torch.Tensor] = {}
        with quiet():
            super().__init__(
                body,
                cost_model.example,
                importance=_importance_of(pruning),
                global_pruning=not pruning.uniform,
                isomorphic=pruning.isomorphic,
                pruning_ratio=_LAST_RATIO,
                max_pruning_ratio=pruning.max_ratio,
                iterative_steps=_STEPS,
                ignored_layers=[head_of(body)],
                # The defaults are objects shared by all pruners, which would keep every pruned network in memory.
                in_channel_groups={},
                out_channel_groups={},
                num_heads={},
            )
        originals = dict(cost_model.original.backbone.named_modules())
        for name, module in body.named_modules():
            if module in self.layer_init_out_ch:
                kind = self.DG.get_pruner_of_module(module)
                self.layer_init_out_ch[module] = kind.get_out_channels(originals[name])
                self.layer_init_in_ch[module] = kind.get_in_channels(originals[name])

    def advance(self) -> bool:
        """Take one step, and return whether it removed a channel."""
        self._scores.clear()
        if not self._settings.uniform:
            self._scope_initial_channels.clear()
            self.current_step = self._idle  # a larger share if the last step removed nothing
        removed = False
        # The generator ranks before it yields: removing channels here does not change the order of the others.
        for group in cast(Iterator[Any], self.step(interactive=True)):
            layer, handler, chosen = group[0].dep.target.module, group[0].dep.handler, group[0].idxs
            if not chosen:
                continue
            group = self.DG.get_pruning_group(layer, handler, self._least_important(layer, len(chosen)))
            if group[0].idxs and self.DG.check_pruning_group(group):
                group.prune()
                removed = True
        self._idle = 0 if removed else self._idle + 1
        self.exhausted = not self._scores or self.current_step == _STEPS
        return removed

    def estimate_importance(self, group: Any) -> torch.Tensor | None:
        """Return the scores of all channels of a group, ``float32 [C]``, and keep them. None: it has no scores."""
        scores = cast("torch.Tensor | None", super().estimate_importance(group))
        if scores is None:
            self.ranked = bool(self.ranked)
            return None
        self.ranked = True
        # One row per group of a grouped convolution. All rows lose the same columns.
        self._scores[group[0].dep.target.module] = scores.clone().view(self._get_channel_groups(group), -1)
        # The library skips a layer if all its channels are below the threshold. Here it is pruned down to its limit.
        scores[scores.argmax()] = torch.inf
        return scores

    def _check_pruning_ratio(self, group: Any) -> bool:
        # A layer at its limit is not ranked, since its channels would be counted as removable.
        room = self._room(group[0].dep.target.module, self._get_channel_groups(group))
        return bool(super()._check_pruning_ratio(group)) and room > 0

    def _least_important(self, layer: nn.Module, count: int) -> list[int]:
        """Choose about ``count`` channels to remove, so that a multiple is left and the limit holds."""
        scores = self._scores[layer]
        groups, columns = scores.shape
        # Also a multiple of the number of groups, which does not change.
        multiple = math.lcm(self._settings.round_to, groups)
        kept = self.DG.get_out_channels(layer) - count
        # Down, as in torch-pruning: otherwise a global ranking would never remove a whole multiple from a narrow layer.
        # Up with a uniform share, which grows from step to step until it reaches a whole multiple.
        kept = (-(-kept // multiple) if self._settings.uniform else kept // multiple) * multiple
        going = min(self.DG.get_out_channels(layer) - kept, self._room(layer, groups))
        least = scores.mean(0).argsort()[: max(going, 0) // groups].tolist()
        return sorted(column + row * columns for column in least for row in range(groups))

    def _room(self, layer: nn.Module, groups: int) -> int:
        """Return how many more channels a layer may lose."""
        multiple = math.lcm(self._settings.round_to, groups)
        # 320·(1 − 0.7) is 96.00000000000001: one channel too many would cost a whole multiple.
        least = math.ceil(self.layer_init_out_ch[layer] * (1 - self.max_pruning_ratio) - 1e-6)
        # Up: the limit holds whatever the multiple and the number of groups. A layer that is too narrow to lose a whole
        # multiple stays as it is. Such layers are in the first blocks, whose channels matter most.
        found: int = self.DG.get_out_channels(layer)
        kept: int = -(-least // multiple) * multiple
        return max(found - kept, 0)


def _importance_of(pruning: PruningConfig) -> Any:
    """Return the function that scores a group of coupled channels."""
    known = torch_pruning.importance
    if pruning.importance == "taylor":
        return _LossChange()
    if pruning.importance == "magnitude":
        # ‖w‖₂² of a channel's weights (Li et al. 2017 with the L1 norm; Fang et al. 2023, eq. 4, over a group).
        return known.GroupMagnitudeImportance(p=2, normalizer=_relative)
    if pruning.importance == "bn-scale":
        # |γ| of the batch norms of a channel (Liu et al. 2017, "Network Slimming", section 3).
        return known.BNScaleImportance(normalizer=_relative)
    return _FilterDistance()


def _relative(scores: torch.Tensor) -> torch.Tensor:
    """Divide by the mean, to make layers of different scales comparable. Zeros stay zeros, not NaN."""
    return scores / scores.mean().clamp_min(torch.finfo(scores.dtype).tiny)


class _LossChange(torch_pruning.importance.Importance):  # type: ignore[misc]
    """First-order Taylor importance: √Σ (w·∂L/∂w)² over all parameters that are removed with a channel.

    Molchanov et al. 2019, eq. 8, over a group of coupled layers (Fang et al. 2023): filters, depthwise ones included, γ
    and β of batch norms, and the inputs of the next layers. The square root makes it a change of the loss.

    The paper recommends eq. 7, (Σ w·∂L/∂w)², for a gate behind a batch norm. For a filter before a batch norm it is
    zero whatever the filter does, since the norm undoes its scale; the same holds for a depthwise filter. Σ |w·∂L/∂w|
    grows with the number of weights, so that γ and β would hardly count. With terms of random sign, eq. 8 has the
    magnitude of eq. 7 whatever the number of weights.

    torch-pruning's own implementation confuses group norms with batch norms, and ignores depthwise convolutions.
    """

    @torch.no_grad()
    def __call__(self, group: Any) -> torch.Tensor:
        total = torch.zeros(len(group[0].idxs))
        for item in group:
            squares = _squares(item.dep.target, item.dep.handler)
            # Behind repeated attention heads, the channel is not known.
            if squares is not None and None not in item.root_idxs:
                total.index_add_(0, torch.as_tensor(item.root_idxs), squares[item.idxs].float().cpu())
        return _relative(total.sqrt())


def _squares(node: Any, handler: Any) -> torch.Tensor | None:
    """Return Σ (w·∂L/∂w)² of the channels that ``handler`` removes, ``[C]``. None: the layer has no parameters."""
    layer = node.module
    if handler in (torch_pruning.prune_conv_in_channels, torch_pruning.prune_linear_in_channels):
        squares, groups = _square(layer.weight), getattr(layer, "groups", 1)
        # Each group of a grouped convolution has inputs of its own.
        return squares.reshape(groups, len(squares) // groups, squares.shape[1], -1).sum((1, 3)).flatten()
    if isinstance(layer, nn.Parameter):  # such as the scale of a block
        own = [_square(layer).movedim(node.pruning_dim, 0)]
    else:
        own = [_square(one) for one in layer.parameters(recurse=False)] if handler in _OUTPUTS else []
    return torch.stack([one.reshape(len(one), -1).sum(1) for one in own]).sum(0) if own else None


def _square(parameter: nn.Parameter) -> torch.Tensor:
    """Return (w·∂L/∂w)² of each weight. Zero: the loss does not depend on it."""
    return torch.zeros_like(parameter) if parameter.grad is None else (parameter * parameter.grad).square()


class _FilterDistance(torch_pruning.importance.Importance):  # type: ignore[misc]
    """Filter pruning via the geometric median: the sum of a filter's distances from the others of its layer.

    He et al. 2019 (FPGM), eq. 6: the filter with the smallest Σⱼ ‖Fᵢ − Fⱼ‖₂ is the most replaceable. Coupled layers,
    such as those added along skip connections, are averaged. torch-pruning's own implementation uses distances of
    |w|², for which a filter equals its negative.
    """

    @torch.no_grad()
    def __call__(self, group: Any) -> torch.Tensor:
        total = torch.zeros(len(group[0].idxs))
        for item in group:
            if item.dep.handler in (
                torch_pruning.prune_conv_out_channels,
                torch_pruning.prune_linear_out_channels,
            ):
                filters = item.dep.target.module.weight[item.idxs].flatten(1).float().cpu()
                distances = _relative(torch.cdist(filters, filters).sum(1))
                total.index_add_(0, torch.as_tensor(item.root_idxs), distances)
        return _relative(total)
