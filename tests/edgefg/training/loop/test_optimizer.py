from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from edgefg.settings.options import with_options
from edgefg.settings.training import FineTuning, TrainingConfig
from edgefg.training.loop.optimizer import create_optimizer, freeze, layer_depths, set_lr, unfreeze
from edgefg.training.methods import build
from edgefg.training.models.backbone import IMAGENET_MEAN, IMAGENET_STD, build_backbone
from edgefg.training.models.network import Network, TrainableNetwork


def network_of(backbone: str, method: str = "plain", **options: Any) -> Network:
    return build(method, build_backbone(backbone, 3), IMAGENET_MEAN, IMAGENET_STD, options)


def config(**changes: Any) -> TrainingConfig:
    return with_options(TrainingConfig(), epochs=1, image_size=32, **changes)


class OneLayer(TrainableNetwork, nn.Linear):
    """A network without a backbone."""


@pytest.mark.parametrize(
    ("backbone", "blocks"),
    [
        ("tf_efficientnet_lite0", 10),  # stem, 7 stages, last convolution, classifier
        ("resnet18", 10),  # stem, 8 blocks, classifier
        ("convnext_atto", 6),  # stem, 4 stages, head
        ("vit_tiny_patch16_224", 14),  # embedding, 12 blocks, head
        ("torchvision:resnet50", 18),
        ("torchvision:vgg16", 16),
    ],
)
def test_depth_falls_from_stem_to_head_by_one_a_block(backbone: str, blocks: int) -> None:
    with torch.device("meta"):  # only names and shapes matter; VGG-16 takes ten seconds to initialise
        network = network_of(backbone)
    found = layer_depths(network)
    order = list(found.values())
    assert order == sorted(order, reverse=True)
    assert sorted(set(order)) == list(range(blocks))
    assert len(found) == len(list(network.parameters()))


def test_a_norm_has_the_depth_of_its_convolution() -> None:
    found = layer_depths(network_of("tf_efficientnet_lite0"))
    assert found["backbone.bn1.weight"] == found["backbone.conv_stem.weight"] == 9
    assert found["backbone.bn2.bias"] == found["backbone.conv_head.weight"] == 1
    # The block's number is compared as a whole: layer1.1 is not layer1.10.
    deep = layer_depths(network_of("resnet50d"))
    assert deep["backbone.layer3.1.conv1.weight"] == deep["backbone.layer3.2.conv1.weight"] + 1


def test_what_methods_add_counts_as_the_last_block_and_their_copies_as_the_backbone() -> None:
    two = network_of("resnet10t", "bcnn", streams=2, pooling="compact", dimensions=64)
    found = layer_depths(two)
    assert found["head.weight"] == 0
    own = {name.removeprefix("backbone."): depth for name, depth in found.items() if name.startswith("backbone.")}
    second = {name.removeprefix("second."): depth for name, depth in found.items() if name.startswith("second.")}
    assert own == second
    assert max(own.values()) > 0
    gated = network_of("resnet10t", "se")
    plain = layer_depths(network_of("resnet10t"))
    found = layer_depths(gated)
    assert {name: found[name] for name in plain} == plain


def rates(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_every_parameter_has_its_rate_and_decay(kind: str) -> None:
    network = network_of("resnet18")
    settings = config(optimizer=kind, layer_decay=0.5, head_lr_ratio=10.0, weight_decay=0.02)
    optimizer = create_optimizer(network, network.new_modules(), settings)
    set_lr(optimizer, 0.1)
    found = rates(network, optimizer)
    assert found.keys() == {name for name, _ in network.named_parameters()}
    assert found["backbone.fc.weight"] == pytest.approx((1.0, 0.02))
    assert found["backbone.fc.bias"] == pytest.approx((1.0, 0.0))
    assert found["backbone.layer4.1.conv1.weight"] == pytest.approx((0.1 * 0.5, 0.02))
    assert found["backbone.layer4.1.bn1.weight"] == pytest.approx((0.1 * 0.5, 0.0))
    assert found["backbone.conv1.weight"] == pytest.approx((0.1 * 0.5**9, 0.02))


def test_parameters_of_an_objective_have_the_rate_of_new_modules() -> None:
    layer, objective = OneLayer(2, 2), nn.Conv2d(2, 3, 1)
    optimizer = create_optimizer(layer, [], config(head_lr_ratio=4.0, weight_decay=0.02), objective)
    set_lr(optimizer, 0.1)
    found = rates(nn.ModuleDict({"layer": layer, "objective": objective}), optimizer)
    assert found["layer.weight"] == pytest.approx((0.1, 0.02))
    assert found["objective.weight"] == pytest.approx((0.4, 0.02))
    assert found["objective.bias"] == pytest.approx((0.4, 0.0))


def test_sgd_is_nesterov_s_by_hand() -> None:
    layer = OneLayer(1, 1, bias=False)
    nn.init.constant_(layer.weight, 1.0)
    optimizer = create_optimizer(layer, [], config(optimizer="sgd", lr=0.1, weight_decay=0.0))
    weight, momentum = 1.0, 0.0
    for step in range(3):
        optimizer.zero_grad()
        (layer.weight**2 / 2).sum().backward()
        optimizer.step()
        momentum = weight if step == 0 else 0.9 * momentum + weight
        weight -= 0.1 * (weight + 0.9 * momentum)
        assert layer.weight.item() == pytest.approx(weight, rel=1e-5)


def test_freezing_holds_all_but_new_modules() -> None:
    network = network_of("resnet10t").train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    freeze(network, network.new_modules(), True)
    optimizer = create_optimizer(network, network.new_modules(), config(lr=0.1))
    network(torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)).square().sum().backward()
    optimizer.step()
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"backbone.fc.weight", "backbone.fc.bias"}
    network.train()
    freeze(network, network.new_modules(), False)
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert network.backbone.layer1[0].bn1.training


@pytest.mark.parametrize(
    ("epochs", "blocks"),
    # Ten blocks, the head's among them; the first epoch has the head alone.
    [(0, [0, 10, 10]), (1, [0, 6, 10, 10]), (8, [0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10]), (20, [0, 2, 2, 3, 3, 4])],
)
def test_blocks_are_unfrozen_from_the_last_to_the_first(epochs: int, blocks: list[int]) -> None:
    network = network_of("resnet18")
    depth = layer_depths(network)
    settings = FineTuning(freeze_epochs=1, unfreeze_epochs=epochs)
    for epoch, learning in enumerate(blocks):
        network.train()
        unfreeze(network, network.new_modules(), settings, epoch)
        expected = {name for name, level in depth.items() if level < learning or name.startswith("backbone.fc.")}
        assert {name for name, parameter in network.named_parameters() if parameter.requires_grad} == expected
        for name, module in network.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.training == (f"{name}.weight" in expected), name
