"""Fake quantisers: round in the forward pass as the deployed graph does, pass the gradient straight through.

The straight-through estimator (Bengio et al. 2013) as in Jacob et al. 2018, section 3: the gradient of a value inside
the range is 1, that of a clipped value 0. The exporter writes each as one QuantizeLinear and one DequantizeLinear.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from edgefg.export.quantize.pairs import QuantParams

# A scale must be above zero, also for a channel of zeros.
_LEAST_SCALE = 1e-8


class FakeQuantizer(nn.Module):
    """Rounds a float tensor to the levels of 8-bit integers.

    Training uses torch's fused operator. Evaluation uses ONNX's formula, which divides by the scale where torch
    multiplies by its inverse: pixels lie exactly between two levels often enough for the logits to show it.

    Args:
        scale: ``float32 []``, or ``[C]``, one for each channel.
        zero: zero points in the same shape; their type is that of the integers.
        axis: the axis of the channels.
    """

    scale: torch.Tensor
    zero: torch.Tensor

    def __init__(self, scale: torch.Tensor, zero: torch.Tensor, axis: int) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self._axis = axis

    def forward(self, real: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the same shape, rounded."""
        if torch.compiler.is_exporting():
            return self._as_pair(real)
        levels = torch.iinfo(self.zero.dtype)
        if not self.training:
            scale, zero = (values.view(self._shape(real)).to(real) for values in (self.scale, self.zero))
            return ((real / scale).round() + zero).clamp(levels.min, levels.max).sub(zero).mul(scale)
        zero = self.zero.int()
        if self.scale.ndim:
            return torch.fake_quantize_per_channel_affine(
                real, self.scale, zero, self._axis, levels.min, levels.max
            )  # fmt: skip
        return torch.fake_quantize_per_tensor_affine(real, self.scale, zero, levels.min, levels.max)

    def _shape(self, real: torch.Tensor) -> list[int]:
        return [-1 if self.scale.ndim and axis == self._axis else 1 for axis in range(real.ndim)]

    def _as_pair(self, real: torch.Tensor) -> torch.Tensor:
        """Return what an exporter writes as a QuantizeLinear and a DequantizeLinear, by ONNX's own names."""
        axis: dict[str, Any] = {"axis": self._axis} if self.scale.ndim else {}
        integers = torch.onnx.ops.symbolic(
            "QuantizeLinear", (real, self.scale, self.zero), axis, dtype=self.zero.dtype, shape=real.shape
        )
        return torch.onnx.ops.symbolic(
            "DequantizeLinear", (integers, self.scale, self.zero), axis, dtype=real.dtype, shape=real.shape
        )


class ActivationQuantizer(FakeQuantizer):
    """Rounds an activation ``[N, …]`` or ``[N, C, …]`` with a fixed scale from calibration."""

    def __init__(self, params: QuantParams) -> None:
        super().__init__(torch.tensor(params.scale), torch.tensor(params.zero), axis=1)


class WeightQuantizer(FakeQuantizer):
    """Rounds weights ``[channels, …]`` to symmetric int8. The scale of a channel follows its greatest weight.

    Args:
        weights: initial weights.
        limit: greatest integer: 127, or 64 for 7 bits.
    """

    def __init__(self, weights: torch.Tensor, limit: int = 127) -> None:
        zero = torch.zeros(weights.shape[0], dtype=torch.int8)
        super().__init__(_scales(weights, limit), zero, axis=0)
        self.register_buffer("zero", zero, persistent=False)  # always the same
        self._limit = limit
        self._frozen = False

    def freeze(self) -> None:
        """Keep the scales as they are from now on: an exporter needs constants."""
        self._frozen = True

    def forward(self, real: torch.Tensor) -> torch.Tensor:
        """Return weights of the same shape, rounded."""
        if not self._frozen:
            self.scale.copy_(_scales(real, self._limit))
        return super().forward(real)


def _scales(weights: torch.Tensor, limit: int) -> torch.Tensor:
    return weights.detach().abs().flatten(1).amax(dim=1).clamp_min(_LEAST_SCALE) / limit
