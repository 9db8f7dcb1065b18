from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from edgefg.errors import TrainingError
from edgefg.settings.training import Augmentation
from edgefg.training.data.mix import create_mixer, evaluating, paste, semantic_shares, semantic_targets
from edgefg.training.losses import cross_entropy
from edgefg.training.methods import build
from edgefg.training.models.backbone import IMAGENET_MEAN, IMAGENET_STD, build_backbone
from edgefg.training.models.network import Batch, Network

CLASSES = 4


def augmentation(mix: Any, **changes: Any) -> Augmentation:
    return Augmentation(mix=mix, **changes)


def plain(name: str) -> Network:
    torch.manual_seed(0)
    return Network(build_backbone(name, CLASSES), IMAGENET_MEAN, IMAGENET_STD)


@pytest.fixture(scope="module")
def network() -> Network:
    return plain("resnet10t")


def flat_batch(levels: list[int], labels: list[int], side: int = 16) -> Batch:
    """Images of one level each, so that a mixed pixel tells where it is from."""
    images = torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].expand(-1, side, side, 3).contiguous()
    boxes = torch.zeros(len(levels), 1, 4)
    return Batch(images, torch.tensor(labels), boxes=boxes, indices=torch.arange(len(levels)))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), alpha=st.sampled_from([0.2, 1.0, 5.0]))
def test_mixup_levels_and_targets_have_the_same_share(seed: int, alpha: float) -> None:
    batch = flat_batch([0, 100, 200], [2, 0, 1])
    mix = create_mixer(augmentation("mixup", mix_alpha=alpha), nn.Identity(), CLASSES)
    assert mix is not None
    torch.manual_seed(seed)
    mixed = mix(nn.Identity(), batch)
    assert mixed.targets is not None
    share = mixed.targets[0, 2].item()
    expected = np.zeros((3, CLASSES))
    for image, (own, before) in enumerate([(2, 1), (0, 2), (1, 0)]):
        expected[image, own] += share
        expected[image, before] += 1 - share
    np.testing.assert_allclose(mixed.targets.numpy(), expected, atol=1e-6)
    levels = np.array([share * 0 + (1 - share) * 200, share * 100, share * 200 + (1 - share) * 100])
    np.testing.assert_allclose(
        mixed.images.numpy(), np.broadcast_to(levels[:, None, None, None], (3, 16, 16, 3)), atol=1e-3
    )
    assert torch.equal(mixed.labels, batch.labels)
    assert mixed.boxes is None
    assert mixed.indices is not None
    assert batch.indices is not None
    assert torch.equal(mixed.indices, batch.indices)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), side=st.sampled_from([1, 7, 16]))
def test_cutmix_targets_are_the_area_that_was_pasted(seed: int, side: int) -> None:
    batch = flat_batch([10, 20, 30], [0, 1, 1], side)
    mix = create_mixer(augmentation("cutmix"), nn.Identity(), CLASSES)
    assert mix is not None
    torch.manual_seed(seed)
    mixed = mix(nn.Identity(), batch)
    assert mixed.targets is not None
    pasted = (mixed.images[0, :, :, 0] == 30).float().mean().item()
    assert (mixed.images[0, :, :, 0] == 10).float().mean().item() == pytest.approx(1 - pasted)
    np.testing.assert_allclose(mixed.targets[0].numpy(), [1 - pasted, pasted, 0, 0], atol=1e-6)
    # Two images of one class are still of that class.
    np.testing.assert_allclose(mixed.targets[2].numpy(), [0, 1, 0, 0], atol=1e-6)
    assert mixed.images.shape == (3, side, side, 3)


def test_mixing_is_seeded_and_its_share_holds() -> None:
    batch = flat_batch([10, 20], [0, 1])
    mix = create_mixer(augmentation("mixup", mix_share=0.3), nn.Identity(), CLASSES)
    assert mix is not None
    torch.manual_seed(5)
    first = [mix(nn.Identity(), batch) for _ in range(400)]
    torch.manual_seed(5)
    again = [mix(nn.Identity(), batch) for _ in range(400)]
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, again, strict=True))
    whole = [mixed for mixed in first if mixed.targets is None]
    assert all(mixed is batch for mixed in whole)
    assert len(whole) / 400 == pytest.approx(0.7, abs=0.08)
    assert create_mixer(augmentation("none"), nn.Identity(), CLASSES) is None


def test_paste_resizes_the_box_of_the_image_before() -> None:
    planes = torch.zeros(2, 3, 8, 8)
    planes[1, :, 2:4, 4:6] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    mixed = paste(planes, into=(0, 4, 4, 8), source=(4, 2, 6, 4))
    wanted = F.interpolate(planes[1:, :, 2:4, 4:6], (4, 4), mode="bilinear")[0]
    assert torch.equal(mixed[0, :, 4:8, 0:4], wanted)
    assert mixed[0].sum() == wanted.sum()
    assert torch.equal(mixed[1, :, :4], planes[1, :, :4])
    assert planes[0].sum() == 0


def test_semantic_targets_by_hand() -> None:
    shares = torch.tensor([[[0.1, 0.2], [0.3, 0.4]], [[0.7, 0.1], [0.1, 0.1]], [[0.25, 0.25], [0.25, 0.25]]])
    left_column, top_left = (0, 0, 1, 2), (0, 0, 1, 1)
    found = semantic_targets(shares, torch.tensor([0, 1, 1]), 3, into=left_column, source=top_left)
    # Image 0 keeps 1 - (0.1 + 0.3) and gets 0.25 of image 2, image 1 gets 0.1 of image 0, image 2 gets 0.7 of image 1.
    expected = [[0.6, 0.25, 0], [0.1, 1 - 0.8, 0], [0, 0.5 + 0.7, 0]]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


def test_targets_that_do_not_sum_to_1_weigh_two_cross_entropies() -> None:
    logits = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    targets = torch.tensor([[0.6, 0.25, 0], [0.0, 1.2, 0]])
    batch = Batch(torch.zeros(2, 1, 1, 3), torch.tensor([0, 1]), targets)
    log = torch.log_softmax(logits, 1)
    expected = -(0.6 * log[0, 0] + 0.25 * log[0, 1] + 1.2 * log[1, 1]) / 2
    assert cross_entropy(0.0)(logits, batch).item() == pytest.approx(expected.item(), rel=1e-6)


def test_shares_are_the_class_activation_map_of_the_label(network: Network) -> None:
    images = torch.randint(0, 256, (3, 64, 48, 3), dtype=torch.uint8)
    labels = torch.tensor([1, 3, 3])
    found = semantic_shares(network, images, labels)
    network.eval()
    with torch.no_grad():
        maps = network.backbone.forward_features(network.normalised(images))
        weights = network.backbone.fc.weight[labels]
        full = F.interpolate(
            torch.einsum("nc,nchw->nhw", weights, maps)[:, None], (64, 48), mode="bilinear", align_corners=False
        )[:, 0].numpy()
    full = full - full.min(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(found.numpy(), full / full.sum(axis=(1, 2), keepdims=True), atol=1e-7)
    assert not found.requires_grad
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_constant_activation_counts_every_pixel_alike(network: Network) -> None:
    weights = network.backbone.fc.weight
    kept = weights.detach().clone()
    with torch.no_grad():
        weights.zero_()
    found = semantic_shares(network, torch.zeros(2, 32, 32, 3, dtype=torch.uint8), torch.tensor([0, 1]))
    with torch.no_grad():
        weights.copy_(kept)
    np.testing.assert_allclose(found.numpy(), 1 / 1024)


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "torchvision:mobilenet_v3_small", "torchvision:resnet18"])
def test_snapmix_takes_any_convolutional_backbone(name: str) -> None:
    network = plain(name)
    torch.manual_seed(2)
    images = torch.randint(0, 256, (4, 48, 48, 3), dtype=torch.uint8)
    batch = Batch(images, torch.tensor([0, 1, 1, 2]), boxes=torch.zeros(4, 1, 4))
    mix = create_mixer(augmentation("snapmix", mix_alpha=5.0), network, CLASSES)
    assert mix is not None
    mixed = mix(network, batch)
    assert mixed.targets is not None
    assert mixed.boxes is None
    assert mixed.images.shape == images.shape
    assert not torch.equal(mixed.images, images.float())
    assert mixed.targets.min() >= 0
    assert mixed.targets.max() <= 2
    # Only the class of the image and that of the one before it have weight.
    allowed = F.one_hot(batch.labels, CLASSES) + F.one_hot(batch.labels, CLASSES).roll(1, 0)
    assert not mixed.targets[allowed == 0].any()
    network.loss(mixed, cross_entropy(0.1)).loss.backward()


def test_snapmix_leaves_modes_and_norms_as_they_were(network: Network) -> None:
    network.train()
    network.backbone.bn1.eval()  # as `freeze` does
    modes = [module.training for module in network.modules()]
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    state = torch.get_rng_state()
    semantic_shares(network, torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8), torch.tensor([0, 1, 2]))
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())
    state_after = torch.get_rng_state()
    assert not torch.equal(state, state_after)  # randint above, and nothing else:
    torch.set_rng_state(state)
    torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    assert torch.equal(torch.get_rng_state(), state_after)


def test_modes_come_back_after_an_error(network: Network) -> None:
    network.train()

    def fail() -> None:
        with evaluating(network):
            assert not network.backbone.training
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert network.backbone.bn1.training


def test_an_empty_box_leaves_the_batch_alone(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    mix = create_mixer(augmentation("snapmix"), network, CLASSES)
    assert mix is not None
    boxes = iter([(0, 0, 8, 8), (3, 3, 3, 9)])
    monkeypatch.setattr("torchvision.transforms.v2.CutMix.make_params", lambda *_: {"box": next(boxes)})
    batch = flat_batch([10, 20], [0, 1])
    assert mix(network, batch) is batch


@pytest.mark.parametrize(
    ("method", "backbone", "named"),
    [
        ("wsdan", "resnet10t", "WSDAN"),
        ("bcnn", "torchvision:resnet18", "BCNN"),
        ("plain", "vit_tiny_patch16_224", "Network"),
    ],
)
def test_snapmix_without_a_whole_classifier_is_refused(method: str, backbone: str, named: str) -> None:
    network = build(method, build_backbone(backbone, CLASSES), IMAGENET_MEAN, IMAGENET_STD, {})
    with pytest.raises(TrainingError, match=rf"snapmix needs .* that of {named} is not .* Use --mix cutmix") as caught:
        create_mixer(augmentation("snapmix"), network, CLASSES)
    assert "\n" not in str(caught.value)
