"""The fake quantisers alone: their levels, their gradients, and scales that follow the weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgefg.export.qat.fake_quantize import ActivationQuantizer, WeightQuantizer
from edgefg.export.quantize.pairs import QuantParams

SIGNED = QuantParams(np.array(0.1, np.float32), np.array(0, np.int8))
UNSIGNED = QuantParams(np.array(0.1, np.float32), np.array(100, np.uint8))
BY_CHANNEL = QuantParams(np.array([0.1, 0.01], np.float32), np.array([100, 0], np.uint8))


@pytest.mark.parametrize(
    ("params", "low", "high"),
    [(SIGNED, [-12.8, -12.8], [12.7, 12.7]), (UNSIGNED, [-10.0, -10.0], [15.5, 15.5]),
     (BY_CHANNEL, [-10.0, 0.0], [15.5, 2.55])],
    ids=["signed", "unsigned", "channels"],
)  # fmt: skip
def test_levels_and_gradients(params: QuantParams, low: list[float], high: list[float]) -> None:
    rounder = ActivationQuantizer(params)
    real = torch.tensor([-20.0, -1.234, 0.0, 1.234, 20.0]).repeat(2, 1).reshape(1, 2, 5).requires_grad_()
    found = rounder(real)
    scale = torch.tensor(params.scale).expand(2)[:, None]
    assert torch.allclose(found[0].amin(dim=1), torch.tensor(low))
    assert torch.allclose(found[0].amax(dim=1), torch.tensor(high))
    inside = (real.detach()[0] >= torch.tensor(low)[:, None]) & (real.detach()[0] <= torch.tensor(high)[:, None])
    assert ((found - real)[0].abs() <= scale / 2 + 1e-6)[inside].all()
    assert (found[..., 2] == 0).all(), "zero, with which convolutions pad, is exact"
    found.sum().backward()
    assert torch.equal(real.grad[0], inside.float())
    assert torch.equal(rounder.eval()(real), found), "away from ties training and evaluation agree"


def test_a_tie_is_rounded_as_onnx_does() -> None:
    """63.5 levels in exact arithmetic: a level of 191 after EfficientNet-Lite0's normalisation."""
    params = QuantParams(np.array(1 / 127, np.float32), np.array(0, np.int8))
    real = torch.full((1, 1), 0.5)
    expected = float(np.rint(np.float32(0.5) / params.scale) * params.scale)
    assert ActivationQuantizer(params).eval()(real).item() == pytest.approx(expected, rel=1e-6)


def test_scales_follow_the_weights_until_frozen() -> None:
    weights = torch.tensor([[1.0, -2.54], [0.0, 0.0]], requires_grad=True)
    rounder = WeightQuantizer(weights)
    assert rounder.scale.tolist() == pytest.approx([0.02, 1e-8 / 127])
    found = rounder(weights)
    assert torch.allclose(found, weights)
    found.sum().backward()
    assert weights.grad is not None
    assert torch.equal(weights.grad, torch.ones(2, 2)), "no weight is cut off"
    rounder(2 * weights)
    assert rounder.scale[0].item() == pytest.approx(0.04)
    rounder.freeze()
    rounder(weights)
    assert rounder.scale[0].item() == pytest.approx(0.04)
    assert WeightQuantizer(weights, 64).scale[0].item() == pytest.approx(2.54 / 64)
    assert list(rounder.state_dict()) == ["scale"]
