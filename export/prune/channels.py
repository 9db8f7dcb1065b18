"""Remove whole channels: what each is worth, how they are ranked, and how many of a layer may go.

The dependency graph, which says what must go together, and the ranking are torch-pruning's (Fang et al. 2023,
"DepGraph"); cap, rounding, the change of the loss and the geometric median are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch_pruning
from torch import nn

from edgefg.errors import ExportError
from edgefg.export.prune.cost import Shares, Yardstick
from edgefg.quiet import quiet
from edgefg.settings.pruning import PruningConfig
from edgefg.training.models.backbone import head_of
from edgefg.training.models.network import Network

# A step takes 2 % of the channels that are ranked: fine enough for the one that crosses the target to end near it.
_STEPS = 48
_LAST_RATIO = 0.96
# What removes a channel together with the first dimension of all of a layer's parameters.
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
    yardstick: Yardstick,
    share: float,
    fill_gradients: Callable[[Network], None],
    progress: Callable[[str], None] | None = None,
) -> Shares:
    """Remove channels in place, the least important first, until ``share`` of what the target measures is left.

    Importance is measured anew before every step. The step that would overshoot is the last one: the network ends at or
    below the target, in evaluation mode.

    Args:
        network: the unpruned network, or one that was pruned before: the cap counts from the unpruned one's widths.
        pruning: the settings.
        yardstick: measures against the unpruned network.
        share: what is to be left, of the unpruned network.
        fill_gradients: leaves in the parameters the loss's gradients; only Taylor importance asks for them.
        progress: told in a line what is left after each step that removed something.

    Returns:
        What is left, all measures.

    Raises:
        ExportError: every layer lost what the cap and whole multiples let it lose, and the target was not reached; or
            no layer has what the importance looks at.
    """
    measure, _ = pruning.target()
    pruner = _Pruner(network, yardstick, pruning)
    left = yardstick.measure(network.eval())
    while left.of(measure) > share and not pruner.exhausted:
        if pruning.importance == "taylor":
            network.zero_grad()
            fill_gradients(network)
            network.eval()
        if pruner.advance():
            left = yardstick.measure(network)
            if progress is not None:
                progress(f"left: {left.render()}")
    if left.of(measure) <= share:
        return left
    if pruner.ranked is False:
        raise ExportError(f"no layer has what importance {pruning.importance} looks at; give another --importance")
    raise ExportError(
        f"with at most {pruning.max_ratio:.0%} of each layer's channels removed, and multiples of {pruning.round_to}"
        f" kept, {left.render()} are left; asked were {share:g} of the {measure}: raise --max-ratio, lower --round-to,"
        " or ask for more to be left"
    )


class _Pruner(torch_pruning.pruner.BasePruner):  # type: ignore[misc]
    """torch-pruning's ranking with a cap and a rounding that hold for every layer at every step.

    The library alone stops at a layer only after it passed the cap, however far a single step went, and counts grouped
    convolutions' channels by group in the one place and all together in the other when it rounds.

    Its share of the channels grows from step to step and counts from the first one, although layers leave the ranking
    as they reach the cap: it would idle, and then take nearly all that the remaining layers have. Here every step takes
    the same share of the channels that are ranked; of a uniform share, the growing one is what is meant.

    ``ranked`` tells whether any layer had a score (None: every one has lost what it may), ``exhausted`` whether a
    further step is of no use.
    """

    def __init__(self, network: Network, yardstick: Yardstick, pruning: PruningConfig) -> None:
        body = network.backbone
        self.ranked: bool | None = None
        self.exhausted = False
        self._idle = 0
        self._settings = pruning
        self._scores: dict[nn.Module, torch.Tensor] = {}
        with quiet():
            super().__init__(
                body,
                yardstick.example,
                importance=_importance_of(pruning),
                global_pruning=not pruning.uniform,
                isomorphic=pruning.isomorphic,
                pruning_ratio=_LAST_RATIO,
                max_pruning_ratio=pruning.max_ratio,
                iterative_steps=_STEPS,
                ignored_layers=[head_of(body)],
                # Its defaults are shared by all pruners, and would keep every pruned network alive.
                in_channel_groups={},
                out_channel_groups={},
                num_heads={},
            )
        originals = dict(yardstick.original.backbone.named_modules())
        for name, module in body.named_modules():
            if module in self.layer_init_out_ch:
                kind = self.DG.get_pruner_of_module(module)
                self.layer_init_out_ch[module] = kind.get_out_channels(originals[name])
                self.layer_init_in_ch[module] = kind.get_in_channels(originals[name])

    def advance(self) -> bool:
        """Take one step; return whether a channel was removed."""
        self._scores.clear()
        if not self._settings.uniform:
            self._scope_initial_channels.clear()
            self.current_step = self._idle  # more than one share where the last one removed nothing
        removed = False
        # The generator ranks before it yields: what is removed here does not change the order of the rest.
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
        """Return the scores of all channels of a group, ``float32 [C]``, and remember them; None: it has none."""
        scores = cast("torch.Tensor | None", super().estimate_importance(group))
        if scores is None:
            self.ranked = bool(self.ranked)
            return None
        self.ranked = True
        # One row a group of a grouped convolution; all rows lose the same columns.
        self._scores[group[0].dep.target.module] = scores.clone().view(self._get_channel_groups(group), -1)
        # The library passes over a layer all of whose channels are below the threshold; here it loses what it may.
        scores[scores.argmax()] = torch.inf
        return scores

    def _check_pruning_ratio(self, group: Any) -> bool:
        # What can lose nothing more is left out of the ranking, where it would stand for channels that could go.
        room = self._room(group[0].dep.target.module, self._get_channel_groups(group))
        return bool(super()._check_pruning_ratio(group)) and room > 0

    def _least_important(self, layer: nn.Module, count: int) -> list[int]:
        """Choose the channels to remove: about ``count``, so that what is left is a multiple and the cap holds."""
        scores = self._scores[layer]
        groups, columns = scores.shape
        # Also of the number of groups, which stays.
        multiple = math.lcm(self._settings.round_to, groups)
        kept = self.DG.get_out_channels(layer) - count
        # Down, as torch-pruning does: a global ranking would else never take a multiple at once from a narrow layer.
        # The uniform share grows from step to step until it is worth a whole multiple, so there it is up.
        kept = (-(-kept // multiple) if self._settings.uniform else kept // multiple) * multiple
        going = min(self.DG.get_out_channels(layer) - kept, self._room(layer, groups))
        least = scores.mean(0).argsort()[: max(going, 0) // groups].tolist()
        return sorted(column + row * columns for column in least for row in range(groups))

    def _room(self, layer: nn.Module, groups: int) -> int:
        """Return how many channels a layer may still lose."""
        multiple = math.lcm(self._settings.round_to, groups)
        # Not 320·(1 − 0.7) = 96.00000000000001: one channel too many costs a whole multiple.
        least = math.ceil(self.layer_init_out_ch[layer] * (1 - self.max_pruning_ratio) - 1e-6)
        # Up: the cap gives way neither to a multiple nor to a convolution's many groups. A layer that is too narrow to
        # lose a whole multiple stays as it is, and those are the first blocks', which a network misses most.
        found: int = self.DG.get_out_channels(layer)
        kept: int = -(-least // multiple) * multiple
        return max(found - kept, 0)


def _importance_of(pruning: PruningConfig) -> Any:
    """Return what scores a group of coupled channels; see the functions and classes for the equations."""
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
    """Divide by the mean, so that layers of different scale compare; a layer of zeros alone stays zero, not NaN."""
    return scores / scores.mean().clamp_min(torch.finfo(scores.dtype).tiny)


class _LossChange(torch_pruning.importance.Importance):  # type: ignore[misc]
    """The first-order change of the loss, √Σ (w·∂L/∂w)² over all parameters that a channel takes along.

    Molchanov et al. 2019, eq. 8, over a group of coupled layers (Fang et al. 2023): filters, depthwise ones too, the
    γ and β of batch norms, and what the next layers read. The root, so that layers compare by the change of the loss
    and not by its square.

    Eq. 7, (Σ w·∂L/∂w)², is what that paper advises for a gate behind a batch norm. Over a filter before a batch norm it
    is zero whatever the filter is worth, since the norm undoes its scale; so it is over a depthwise filter. Of
    Σ |w·∂L/∂w|, which grows with the number of weights, γ and β would be two of hundreds. Terms of random sign give
    eq. 8 the size of eq. 7 for few weights and many.

    torch-pruning's own asks for group norms where it means batch norms, and leaves depthwise convolutions out.
    """

    @torch.no_grad()
    def __call__(self, group: Any) -> torch.Tensor:
        total = torch.zeros(len(group[0].idxs))
        for item in group:
            squares = _squares(item.dep.target, item.dep.handler)
            # Behind repeated heads of attention it is not known which channel is meant.
            if squares is not None and None not in item.root_idxs:
                total.index_add_(0, torch.as_tensor(item.root_idxs), squares[item.idxs].float().cpu())
        return _relative(total.sqrt())


def _squares(node: Any, handler: Any) -> torch.Tensor | None:
    """Return a layer's Σ (w·∂L/∂w)², ``[C]``, for the channels that ``handler`` removes; None: it has no parameters."""
    layer = node.module
    if handler in (torch_pruning.prune_conv_in_channels, torch_pruning.prune_linear_in_channels):
        squares, groups = _square(layer.weight), getattr(layer, "groups", 1)
        # Each group of a grouped convolution reads inputs of its own.
        return squares.reshape(groups, len(squares) // groups, squares.shape[1], -1).sum((1, 3)).flatten()
    if isinstance(layer, nn.Parameter):  # such as the scale of a block
        own = [_square(layer).movedim(node.pruning_dim, 0)]
    else:
        own = [_square(one) for one in layer.parameters(recurse=False)] if handler in _OUTPUTS else []
    return torch.stack([one.reshape(len(one), -1).sum(1) for one in own]).sum(0) if own else None


def _square(parameter: nn.Parameter) -> torch.Tensor:
    """Return (w·∂L/∂w)² of each weight; zeros where the loss does not depend on them."""
    return torch.zeros_like(parameter) if parameter.grad is None else (parameter * parameter.grad).square()


class _FilterDistance(torch_pruning.importance.Importance):  # type: ignore[misc]
    """Filter pruning by the geometric median: the sum of a filter's distances from the others of its layer.

    He et al. 2019 (FPGM), eq. 6: the filter with the smallest Σⱼ ‖Fᵢ − Fⱼ‖₂ is the one that the others replace best.
    Of coupled layers, such as those that are added up along skip connections, it is the mean.
    torch-pruning's own measures distances of |w|², to which a filter and its negative are the same.
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
