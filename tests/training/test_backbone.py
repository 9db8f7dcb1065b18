from __future__ import annotations

import pytest
import torch
from torch import nn

from edgefg.errors import WeightsError
from edgefg.training.models.backbone import build_backbone, default_normalisation, head_of
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
