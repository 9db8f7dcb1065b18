from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from edgefg.data import load_dataset
from edgefg.training.losses import cross_entropy
from edgefg.training.models.backbone import IMAGENET_MEAN, IMAGENET_STD, build_backbone
from edgefg.training.models.network import (
    Batch,
    Network,
    NoOptions,
    TrainableNetwork,
    class_activation,
    full_precision,
    mean_logits,
    scaled,
)


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    return Network(build_backbone("test_resnet", 3), IMAGENET_MEAN, IMAGENET_STD).eval()


IMAGES = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_defaults_of_a_trainable_network() -> None:
    network = TrainableNetwork()
    assert list(network.new_modules()) == []
    assert network.layers_root() is network
    assert network.classifies_in(0, 3)
    assert (network.forward_methods, network.new_module_lr_ratio) == ((), 1.0)
    network.begin_epoch(0, 3)


def test_pixels_are_normalised_by_mean_and_standard_deviation(network: Network) -> None:
    planes = network.normalised(IMAGES)
    assert planes.shape == (2, 3, 32, 32)
    expected = (IMAGES[0, 5, 7, 1].item() - IMAGENET_MEAN[1]) / IMAGENET_STD[1]
    assert planes[0, 1, 5, 7].item() == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_logits_embedding_and_maps_belong_together(network: Network) -> None:
    step = network.loss(Batch(IMAGES, torch.tensor([0, 1])), cross_entropy(0.0))
    logits, maps = network.logits_and_maps(IMAGES)
    torch.testing.assert_close(step.logits, network(IMAGES))
    torch.testing.assert_close(logits, step.logits)
    torch.testing.assert_close(network.features(IMAGES), step.embedding)
    torch.testing.assert_close(step.loss, nn.functional.cross_entropy(logits, torch.tensor([0, 1])))
    assert maps.shape[:1] + maps.shape[2:] == (2, 1, 1)
    assert [type(module) for module in network.new_modules()] == [nn.Linear]
    assert network.layers_root() is network.backbone


def test_plain_fine_tuning_drops_boxes_of_parts(birds: Path) -> None:
    data = load_dataset(birds)
    assert data.boxes is not None
    options, used = Network.prepare(NoOptions(), data)
    assert (options, used.parts, used.boxes) == (NoOptions(), (), None)


def test_class_activation_is_cam_for_a_linear_head_on_pooled_maps() -> None:
    maps = torch.rand(2, 4, 3, 3)
    weight = torch.randn(5, 4)
    found = class_activation(maps, lambda planes: planes.mean(dim=(2, 3)) @ weight.T).maps
    named = (maps.mean(dim=(2, 3)) @ weight.T).argmax(dim=1)
    expected = torch.einsum("nchw,nc->nhw", maps, weight[named]).relu()
    assert found is not None
    torch.testing.assert_close(found[:, 0], scaled(expected[:, None])[:, 0])


def test_maps_are_scaled_to_0_to_1() -> None:
    maps = torch.tensor([[[[1.0, 3.0], [2.0, 5.0]], [[7.0, 7.0], [7.0, 7.0]]]])
    expected = torch.tensor([[[[0.0, 0.5], [0.25, 1.0]], [[0.0, 0.0], [0.0, 0.0]]]])
    torch.testing.assert_close(scaled(maps), expected)


def test_mean_logits_give_the_mean_of_the_softmaxes() -> None:
    passes = [torch.randn(3, 4) for _ in range(3)]
    expected = torch.stack([logits.softmax(dim=1) for logits in passes]).mean(dim=0)
    torch.testing.assert_close(mean_logits(passes).softmax(dim=1), expected)


def test_full_precision_switches_autocast_off() -> None:
    one = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (one @ one).dtype == torch.bfloat16
        with full_precision(one):
            assert (one @ one).dtype == torch.float32
