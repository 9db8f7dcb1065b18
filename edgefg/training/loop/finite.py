"""Find out whether an error in a training step was caused by NaN or infinite values.

After a bad step, the first error may be raised far from its cause, for instance when sampling from probabilities or
cropping to empty boxes. Its message does not mention NaN, so the step is repeated while layer outputs are checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import nn


def layers_stay_finite(network: nn.Module, call: Callable[[], object]) -> bool:
    """Whether all layers of ``network`` have finite outputs while ``call`` runs. Errors of ``call`` are ignored."""
    # A GPU on which an assertion failed raises on every further call.
    with _watch(network) as finite, suppress(Exception), torch.no_grad():
        call()
    return all(finite)


@contextmanager
def _watch(network: nn.Module) -> Iterator[list[bool]]:
    """Record for every output of a layer whether it is finite."""
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
