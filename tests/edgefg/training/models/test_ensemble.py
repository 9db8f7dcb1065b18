from __future__ import annotations

import numpy as np
import pytest
import torch

from edgefg.errors import WeightsError
from edgefg.preprocess import InputSpec
from edgefg.training.models.backbone import build_backbone
from edgefg.training.models.ensemble import Ensemble, Member, resized
from edgefg.training.models.network import Network

IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 48, 48, 3), np.uint8))


@pytest.fixture(scope="module")
def members() -> list[Member]:
    torch.manual_seed(0)
    sizes = {"test_resnet": 32, "test_efficientnet": 48}
    return [
        Member(Network(build_backbone(name, 3), (127.0,) * 3, (60.0,) * 3).eval(), InputSpec(height=side, width=side))
        for name, side in sizes.items()
    ]


def test_images_that_have_the_size_are_not_resized() -> None:
    assert resized(IMAGES, 48, 48) is IMAGES
    smaller = resized(IMAGES, 24, 32)
    assert smaller.shape == (5, 24, 32, 3)
    assert smaller.dtype == torch.float32


@torch.no_grad()
def test_probabilities_are_averaged_with_each_member_at_its_own_size(members: list[Member]) -> None:
    expected = [member.network(resized(IMAGES, *2 * (member.input.height,))).softmax(dim=1) for member in members]
    found = Ensemble(members).eval()(IMAGES).softmax(dim=1)
    torch.testing.assert_close(found, torch.stack(expected).mean(dim=0))


@torch.no_grad()
def test_images_of_another_size_are_resized_in_proportion(members: list[Member]) -> None:
    seen: list[tuple[int, ...]] = []
    hooks = [
        member.network.register_forward_hook(lambda _, images, __: seen.append(tuple(images[0].shape[1:3])))
        for member in members
    ]
    Ensemble(members)(resized(IMAGES, 96, 96))
    assert seen == [(64, 64), (96, 96)]
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def test_features_are_concatenated_and_attention_is_the_first_members(members: list[Member]) -> None:
    ensemble, (first, _) = Ensemble(members), members[0]
    widths = [member.network.features(IMAGES[:1]).shape[1] for member in members]
    assert ensemble.features(IMAGES).shape == (len(IMAGES), sum(widths))
    found, expected = ensemble.attention(IMAGES).maps, first.attention(resized(IMAGES, 32, 32)).maps
    assert found is not None
    assert expected is not None
    torch.testing.assert_close(found, expected)


def test_an_ensemble_is_neither_trained_nor_has_it_maps(members: list[Member]) -> None:
    ensemble = Ensemble(members)
    with pytest.raises(WeightsError, match="Train its members"):
        ensemble.loss(None, None)  # type: ignore[arg-type]
    with pytest.raises(WeightsError, match="Compare only its predictions"):
        ensemble.logits_and_maps(IMAGES)
    assert list(ensemble.new_modules()) == []
