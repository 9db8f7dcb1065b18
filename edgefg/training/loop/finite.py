"""Whether an error of a training step comes from numbers that are no longer finite, or is one of its own.

Weights that a step threw far off fail where a method first looks at what they give: a draw by probabilities, boxes of
no size. What is raised there says nothing of the cause, so the step is repeated and watched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import nn


def layers_stay_finite(network: nn.Module, call: Callable[[], object]) -> bool:
    """Whether every layer of ``network`` gives finite numbers while ``call`` runs; what ``call`` raises is not told."""
    # A GPU on which an assertion failed answers nothing any more.
    with _watch(network) as finite, suppress(Exception), torch.no_grad():
        call()
    return all(finite)


@contextmanager
def _watch(network: nn.Module) -> Iterator[list[bool]]:
    """Note for every tensor that a layer gives whether it is finite."""
    finite: list[bool] = []

    def note(module: nn.Module, inputs: object, output: object) -> None:
        for value in output if isinstance(output, tuple | list) else [output]:
            if isinstance(value, torch.Tensor):
                finite.append(_is_finite(value))

    handles = [module.register_forward_hook(note) for module in network.modules()]
    try:
        yield finite
    finally:
        for handle in handles:
            handle.remove()


def _is_finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
