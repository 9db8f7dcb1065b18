from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torchvision.transforms.functional import normalize

from edgefg.errors import WeightsError
from edgefg.training.models import backbone as backbone_module
from edgefg.training.models.backbone import (
    build_backbone,
    channels,
    classes_of,
    classify,
    default_normalisation,
    embedding,
    head_of,
    logits_and_embedding,
    maps,
    without_head,
)
from edgefg.training.models.network import Network


@pytest.mark.parametrize("name", ["test_efficientnet", "torchvision:mobilenet_v3_small", "squeezenet1_1"])
def test_a_backbone_of_either_library_has_the_asked_for_head(name: str) -> None:
    backbone = build_backbone(name, 7).eval()
    logits = backbone(torch.zeros(1, 3, 64, 64))
    assert logits.shape == (1, 7)
    head = head_of(backbone)
    assert 7 in (getattr(head, "out_features", 0), getattr(head, "out_channels", 0))


def test_an_unknown_backbone_names_similar_ones() -> None:
    with pytest.raises(WeightsError, match=r"'resnet5O'.*similar names: .*resnet"):
        build_backbone("resnet5O", 2)


def test_pixels_are_normalised_inside_the_network() -> None:
    seen = []

    class Spy(nn.Module):
        def forward(self, planes: torch.Tensor) -> torch.Tensor:
            seen.append(planes)
            return planes.mean((2, 3))

    network = Network(Spy(), (10.0, 20.0, 30.0), (2.0, 4.0, 5.0))
    image = torch.tensor([[[[12, 28, 35]]]], dtype=torch.uint8)
    assert network(image).tolist() == [[1.0, 2.0, 1.0]]
    assert seen[0].shape == (1, 3, 1, 1)
    assert not network.state_dict()


def test_normalisation_is_that_of_the_published_weights() -> None:
    mean, std = default_normalisation(build_backbone("tf_efficientnet_lite0", 2))
    assert mean == (127.5,) * 3
    assert std == (127.5,) * 3
    mean, _ = default_normalisation(build_backbone("torchvision:mobilenet_v3_small", 2))
    assert mean[0] == pytest.approx(123.675)


TORCHVISION = torchvision.models.list_models(torchvision.models)


@pytest.mark.parametrize("name", TORCHVISION)
def test_normalisation_is_that_of_torchvisions_own_transforms(name: str) -> None:
    settings = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    levels = torch.rand(1, 3, 4, 4)
    expected = normalize(levels, settings.mean, settings.std)
    if name in ("googlenet", "inception_v3"):  # what torchvision switches on for its weights
        with torch.device("meta"):
            own = torchvision.models.get_model(name, init_weights=False, transform_input=True)
        expected = own._transform_input(expected)
    stand_in: Any = nn.Identity()
    stand_in.pretrained_cfg = backbone_module._published(name)
    torch.testing.assert_close(normalize(levels * 255, *default_normalisation(stand_in)), expected)


@pytest.mark.parametrize("name", ["torchvision:googlenet", "torchvision:inception_v3", "efficientnet_v2_l"])
def test_a_network_from_torchvision_brings_its_normalisation(name: str) -> None:
    with torch.device("meta"):
        mean, std = default_normalisation(build_backbone(name, 2))
    assert mean == std == (127.5,) * 3


APART = [
    *("resnet10t", "tf_efficientnet_lite0", "mobilenetv3_small_050", "mobilenetv4_conv_small", "regnetx_002"),
    *("convnext_atto", "vgg11", "densenet121", "repvgg_a0"),
    *(f"torchvision:{name}" for name in ("alexnet", "vgg11", "resnet18", "mobilenet_v2", "mobilenet_v3_small")),
    *(f"torchvision:{name}" for name in ("densenet121", "efficientnet_b0", "mnasnet0_5", "regnet_x_400mf")),
    *(f"torchvision:{name}" for name in ("shufflenet_v2_x0_5", "googlenet", "inception_v3", "convnext_tiny")),
    pytest.param("torchvision:vgg16", marks=pytest.mark.slow),
    pytest.param("torchvision:maxvit_t", marks=pytest.mark.slow),
    pytest.param("torchvision:swin_t", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name", APART)
@torch.no_grad()
def test_maps_embedding_and_logits_are_the_backbones_own(name: str) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(name, 5).eval()
    planes = torch.randn(1, 3, 224, 224) if name.endswith("maxvit_t") else torch.randn(2, 3, 96, 96)
    found = maps(backbone, planes)
    embedded = embedding(backbone, found)
    logits = backbone(planes)
    assert found.ndim == 4
    assert channels(backbone) == found.shape[1]
    assert classes_of(backbone) == 5
    torch.testing.assert_close(classify(backbone, embedded), logits)
    torch.testing.assert_close(logits_and_embedding(backbone, planes), (logits, embedded))
    torch.testing.assert_close(maps(without_head(backbone), planes), found)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("test_vit", "VisionTransformer has features of shape .*not .N, C, h, w."),
        ("torchvision:squeezenet1_0", "the head of SqueezeNet does not follow a global pooling"),
        ("torchvision:vit_b_16", "the head of VisionTransformer does not follow a global pooling"),
    ],
)
def test_what_cannot_be_taken_apart_says_so(name: str, message: str) -> None:
    size = 224 if name.endswith("16") else 160
    with pytest.raises(WeightsError, match=message):
        maps(build_backbone(name, 2), torch.zeros(1, 3, size, size))


def test_two_classifiers_are_one_too_many() -> None:
    with pytest.raises(WeightsError, match=r"has 2 classifiers\. Use a backbone with one"):
        head_of(build_backbone("efficientformerv2_s0", 2))
