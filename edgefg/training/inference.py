"""A network as the function of frames that `edgefg.evaluation` runs over images."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from edgefg.evaluation.predictions import LogitsFunction
from edgefg.preprocess import InputSpec, UInt8Array, prepare


def network_logits(network: nn.Module, spec: InputSpec) -> LogitsFunction:
    """Return a network's logits, ``float32 [N, classes]``, as a function of frames, each ``uint8 [H, W, 3]`` BGR.

    Args:
        network: takes ``uint8 [N, height, width, 3]`` RGB; it is put into evaluation mode and stays where it is.
        spec: its input.
    """
    network.eval()
    device = next(network.parameters()).device

    @torch.inference_mode()
    def logits(frames: list[UInt8Array]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        inputs = torch.from_numpy(np.stack([prepare(frame, spec) for frame in frames]))
        found: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = network(inputs.to(device)).float().cpu().numpy()
        return found

    return logits
