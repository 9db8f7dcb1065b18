from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgefg import __version__
from edgefg.errors import DataError, WeightsError
from edgefg.preprocess import InputSpec
from edgefg.settings.split import SplitSpec
from edgefg.training.checkpoint import SCHEMA, Header, load, save
from edgefg.training.loop.optimizer import freeze
from edgefg.training.losses import cross_entropy
from edgefg.training.methods import build, describe
from edgefg.training.models.backbone import build_backbone
from edgefg.training.models.bcnn import BCNN, CompactPooling, FullPooling, signed_root
from edgefg.training.models.network import Batch
from tests.edgefg.training.short import losses_of

GRAY = (127.0,) * 3
# Their old heads have two layers more.
HEAVY = [pytest.param(name, marks=pytest.mark.slow) for name in ("vgg11", "torchvision:alexnet")]


def bcnn(name: str = "resnet10t", classes: int = 3, **options: Any) -> BCNN:
    torch.manual_seed(0)
    network = build("bcnn", build_backbone(name, classes), GRAY, GRAY, options)
    assert isinstance(network, BCNN)
    return network.eval()


def pictures(count: int = 2, side: int = 64) -> torch.Tensor:
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_full_pooling_is_the_mean_of_the_outer_products() -> None:
    random = np.random.default_rng(0)
    x, y = random.normal(size=(2, 3, 4, 5)), random.normal(size=(2, 6, 4, 5))
    expected = np.zeros((2, 3, 6))
    for n, row, column in np.ndindex(2, 4, 5):
        expected[n] += np.outer(x[n, :, row, column], y[n, :, row, column]) / 20
    found = FullPooling(3, 6)(torch.from_numpy(x), torch.from_numpy(y))
    np.testing.assert_allclose(found.numpy(), expected.reshape(2, -1), atol=1e-12)


def test_the_signed_root_keeps_the_sign_and_has_finite_slopes() -> None:
    z = torch.tensor([-4.0, -1e-12, 0.0, 1e-12, 0.25], dtype=torch.float64, requires_grad=True)
    root = signed_root(z)
    np.testing.assert_allclose(root.detach(), [-2, 0, 0, 0, 0.5], atol=4e-3)
    assert root[2] == 0
    root.sum().backward()
    assert z.grad is not None
    # 1 / (2 √(|z| + ε)), at most 1 / (2 √ε).
    np.testing.assert_allclose(z.grad[[0, 1, 3, 4]], 0.5 / np.sqrt(np.array([4, 0, 0, 0.25]) + 1e-5), rtol=1e-6)


@pytest.mark.parametrize("pooling", ["full", "compact"])
def test_maps_of_zeros_give_finite_gradients(pooling: str) -> None:
    network = bcnn(pooling=pooling, dimensions=64, projection=8)
    maps = torch.zeros(2, 512, 2, 2, requires_grad=True)
    embedded = network._embed(maps, maps)
    assert not embedded.any()
    network.head(embedded).square().sum().backward()
    assert maps.grad is not None
    assert all(g is None or g.isfinite().all() for g in [maps.grad, *(p.grad for p in network.parameters())])


def test_the_embedding_is_the_papers_formula_with_the_sign_of_two_streams() -> None:
    network = bcnn(streams=2, projection=5)
    with torch.no_grad():
        x, y = network._maps(pictures())
        embedded = network.features(pictures()).numpy()
        left, right = (p(m).flatten(2).numpy() for p, m in zip(network.projections, (x, y), strict=True))
    z = np.stack([a @ b.T / 4 for a, b in zip(left, right, strict=True)]).reshape(2, 25)
    root = np.sign(z) * (np.sqrt(np.abs(z) + 1e-5) - np.sqrt(1e-5))
    np.testing.assert_allclose(embedded, root / np.linalg.norm(root, axis=1, keepdims=True), atol=1e-5)
    assert (z < -1e-3).any()
    assert (np.sign(embedded) == np.sign(z)).all()


def test_one_stream_multiplies_the_maps_with_themselves() -> None:
    network = bcnn(projection=5)
    embedded = network.features(pictures()).detach().reshape(2, 5, 5)
    torch.testing.assert_close(embedded, embedded.transpose(1, 2))
    torch.testing.assert_close(embedded.flatten(1).norm(dim=1), torch.ones(2))


def test_compact_pooling_keeps_inner_products() -> None:
    random = torch.Generator().manual_seed(0)
    x, y = (torch.randn(6, 16, 3, 3, generator=random, dtype=torch.float64) + 0.5 for _ in range(2))
    full = FullPooling(16, 16)(x, y)
    exact = full @ full.T
    errors = []
    for size in (256, 16384):
        sketch = CompactPooling(16, 16, size, seed=1).double()(x, y)
        assert sketch.shape == (6, size)
        errors.append(float((sketch @ sketch.T - exact).norm() / exact.norm()))
    # The error falls with the root of the length: here by 8.
    assert errors[1] < 0.03
    assert errors[1] < errors[0] / 3
    draws = [CompactPooling(16, 16, 256, seed).double()(x, y) for seed in range(60)]
    mean = torch.stack([draw @ draw.T for draw in draws]).mean(dim=0)
    assert (mean - exact).norm() / exact.norm() < errors[0] / 3


def test_the_seed_draws_the_sketch() -> None:
    first, again, other = (CompactPooling(4, 4, 8, seed) for seed in (1, 1, 2))
    assert first.first.abs().eq(1).all()
    assert first.first.equal(again.first)
    assert not first.first.equal(other.first)
    assert not first.first.equal(first.second)
    # NumPy promises that this stream never changes; a checkpoint relies on it.
    assert first.first[:2].int().tolist() == [[1, -1, 1, -1], [1, -1, 1, 1]]


def test_an_absurd_classifier_is_refused_with_the_options_that_help() -> None:
    with pytest.raises(
        DataError, match=r"1280 channels for 81 classes needs 133 million.*pooling=compact.*at most 1111"
    ):
        bcnn("tf_efficientnet_lite0", 81)
    assert bcnn("tf_efficientnet_lite0", 81, projection=64).head.in_features == 64 * 64


@pytest.mark.slow
def test_the_papers_own_classifier_is_allowed() -> None:
    assert bcnn("resnet10t", 200).head.weight.shape == (200, 512 * 512)


def test_a_transformer_is_refused() -> None:
    with pytest.raises(WeightsError, match="convolutional"):
        bcnn("test_vit")
    with pytest.raises(WeightsError, match="does not follow a global pooling"):
        bcnn("torchvision:squeezenet1_1")


@pytest.mark.parametrize(
    "name", ["resnet10t", "mobilenetv3_small_050", "vgg11", "convnext_atto", "torchvision:alexnet"]
)
@pytest.mark.parametrize("streams", [1, 2])
def test_nothing_of_the_old_head_remains(name: str, streams: int) -> None:
    network = bcnn(name, projection=4, streams=streams)
    network(pictures(1, 96)).sum().backward()
    assert [key for key, parameter in network.named_parameters() if parameter.grad is None] == []


def test_the_constructor_leaves_mode_and_statistics_alone() -> None:
    network = BCNN(build_backbone("resnet10t", 3).train(), GRAY, GRAY)
    assert all(module.training for module in network.backbone.modules())
    assert all(int(b) == 0 for name, b in network.named_buffers() if name.endswith("num_batches_tracked"))


@pytest.mark.parametrize("options", [{}, {"streams": 2, "projection": 8}, {"pooling": "compact", "dimensions": 32}])
@pytest.mark.parametrize("name", ["resnet10t", "torchvision:mobilenet_v3_small"])
def test_a_checkpoint_gives_the_same_network(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    network = bcnn(name, **options)
    header = Header(
        schema=SCHEMA, kind="teacher", method="bcnn", options=options, backbone=name, labels=("a", "b", "c"),
        input=InputSpec(height=64, width=64), mean=GRAY, std=GRAY, dataset="d" * 64, split=SplitSpec(),
        edgefg=__version__,
    )  # fmt: skip
    save(tmp_path / "t.safetensors", network, header)
    again, _ = load(tmp_path / "t.safetensors")
    assert not any("pooling" in key for key in network.state_dict())
    torch.testing.assert_close(again(pictures()), network(pictures()), rtol=0, atol=0)


def test_the_classifier_learns_first() -> None:
    network = bcnn(projection=8, streams=2)
    freeze(network, network.new_modules(), frozen=True)
    learning = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    assert learning == ["projections.0.weight", "projections.1.weight", "head.weight", "head.bias"]


@pytest.mark.parametrize("streams", [1, 2])
def test_attention_shows_the_maps_of_the_first_stream(streams: int) -> None:
    network = bcnn(projection=8, streams=streams)
    shown = network.attention(pictures(side=96)).maps
    assert shown is not None
    assert shown.shape == (2, 1, 3, 3)
    assert shown.amin() >= 0
    assert shown.amax() == 1


def test_a_step_gives_what_the_classifier_reads() -> None:
    network = bcnn(projection=4)
    labels = torch.tensor([0, 2])
    step = network.loss(Batch(pictures(), labels), cross_entropy(0.0))
    torch.testing.assert_close(step.logits, network(pictures()))
    torch.testing.assert_close(step.embedding, network.features(pictures()))
    torch.testing.assert_close(step.loss, nn.functional.cross_entropy(step.logits, labels))


def test_mixed_precision_pools_in_full() -> None:
    network = bcnn(projection=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embedded = network.features(pictures())
    assert embedded.dtype == torch.float32
    torch.testing.assert_close(embedded, network.features(pictures()), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"projection": 32}, marks=pytest.mark.slow),
        pytest.param({"projection": 16, "streams": 2}, marks=pytest.mark.slow),
        {"pooling": "compact", "dimensions": 512, "projection": 32},
    ],
)
def test_training_lowers_the_loss(birds: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    first, *_, last = losses_of(birds, tmp_path, "bcnn", **options)
    assert last < first - 0.05


def test_the_paper_s_two_steps_are_told_where_methods_are_listed() -> None:
    assert "--freeze-epochs" in describe("bcnn").render()
    assert describe("plain").render().count("\n") == 0
