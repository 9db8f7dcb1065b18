from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from edgefg.errors import TrainingError
from edgefg.settings.options import with_options
from edgefg.settings.training import TrainingConfig
from edgefg.training.losses import CenterLoss, TripletLoss, cross_entropy
from edgefg.training.methods import build
from edgefg.training.models.backbone import IMAGENET_MEAN, IMAGENET_STD, build_backbone
from edgefg.training.models.network import Batch, Network
from edgefg.training.objective import TeacherObjective


def config(**changes: Any) -> TrainingConfig:
    return with_options(TrainingConfig(), epochs=1, image_size=32, **changes)


def network_of(method: str = "plain") -> Network:
    torch.manual_seed(0)
    return build(method, build_backbone("test_resnet", 3), IMAGENET_MEAN, IMAGENET_STD, {})


@pytest.fixture
def batch() -> Batch:
    images = torch.randint(0, 256, (6, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return Batch(images, torch.tensor([0, 0, 1, 1, 2, 2]))


def test_plain_is_cross_entropy_alone(batch: Batch) -> None:
    network = network_of().eval()
    loss, logits = TeacherObjective(config(label_smoothing=0.2), network, 3)(network, batch)
    assert torch.equal(logits, network(batch.images))
    assert loss.item() == pytest.approx(cross_entropy(0.2)(logits, batch).item())


def test_center_and_triplet_are_added_with_their_weights(batch: Batch) -> None:
    network = network_of().eval()
    plain, _ = TeacherObjective(config(), network, 3)(network, batch)
    chosen = config(center_weight=0.3, triplet_weight=0.7, sampler="pk", mining="semihard")
    objective = TeacherObjective(chosen, network, 3)
    loss, _ = objective(network, batch)
    embedded = network.features(batch.images)
    center = CenterLoss(3, embedded.shape[1])(embedded, batch.labels)
    triplet = TripletLoss("semihard")(embedded, batch.labels)
    assert center > 0
    assert loss.item() == pytest.approx((plain + 0.3 * center + 0.7 * triplet).item(), rel=1e-5)
    # The centres moved, and are what a run must store.
    assert objective.state_dict().keys() == {"center.centres"}
    assert objective.center is not None
    assert objective.center.centres.any()


@pytest.mark.parametrize("method", ["plain", "wsdan", "bcnn", "racnn"])
def test_centres_fit_every_method_s_embedding(method: str, batch: Batch) -> None:
    network = network_of(method)
    modes = [module.training for module in network.modules()]
    objective = TeacherObjective(config(center_weight=0.003), network, 3)
    assert [module.training for module in network.modules()] == modes
    loss, _ = objective(network.train(), batch)
    assert torch.isfinite(loss)


def test_a_mixed_batch_is_judged_by_its_targets(batch: Batch) -> None:
    network = network_of().eval()
    objective = TeacherObjective(config(mix="mixup", label_smoothing=0.0), network, 3)
    torch.manual_seed(4)
    loss, logits = objective(network, batch)
    torch.manual_seed(4)
    torch.rand(())
    share = torch.distributions.Beta(torch.ones(1), torch.ones(1)).sample().item()
    planes = batch.images.float()
    assert torch.allclose(logits, network(share * planes + (1 - share) * planes.roll(1, 0)), atol=1e-4)
    log = torch.log_softmax(logits, 1).detach().numpy()
    rows, labels = np.arange(6), batch.labels.numpy()
    expected = -(share * log[rows, labels] + (1 - share) * log[rows, np.roll(labels, 1)]).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("weights", [{"center_weight": 0.003}, {"triplet_weight": 1.0, "sampler": "pk"}])
@pytest.mark.parametrize("mix", ["mixup", "cutmix", "snapmix"])
def test_mixed_images_have_no_class_to_be_drawn_to(mix: str, weights: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match=rf"{mix} cannot be combined with a center or triplet loss.* Remove --mix"):
        TeacherObjective(config(mix=mix, **weights), network_of(), 3)


@pytest.mark.parametrize("sampler", ["shuffle", "balanced"])
def test_a_triplet_loss_needs_the_pk_sampler(sampler: str) -> None:
    with pytest.raises(TrainingError, match="Add --sampler pk"):
        TeacherObjective(config(triplet_weight=1.0, sampler=sampler), network_of(), 3)
