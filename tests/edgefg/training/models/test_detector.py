from __future__ import annotations

import pytest
import torch

from edgefg.errors import WeightsError
from edgefg.training.models.backbone import build_backbone, maps
from edgefg.training.models.detector import PartDetector, find_levels
from edgefg.training.models.geometry import Constraint, PositionPrior, best_configuration

_SIDE = 96
PLANES = torch.zeros(2, 3, _SIDE, _SIDE)


def test_levels_are_the_last_maps_of_each_stride() -> None:
    backbone = build_backbone("resnet18", 3)
    levels = find_levels(backbone, 8)
    assert {level: channels for level, (_, channels) in levels.items()} == {"3": 128, "4": 256, "5": 512}
    assert levels["5"][0].startswith("layer4")
    assert list(find_levels(backbone, 16)) == ["4", "5"]
    with pytest.raises(WeightsError, match="Use a convolutional backbone"):
        find_levels(build_backbone("test_vit", 3), 8)


def test_regions_and_losses_have_their_shapes() -> None:
    torch.manual_seed(0)
    backbone = build_backbone("resnet10t", 3).eval()
    detector = PartDetector(find_levels(backbone, 8), 2, width=16, proposals=10)
    boxes = torch.tensor([[[10.0, 10, 60, 60], [20, 20, 40, 40]], [[float("nan")] * 4] * 2])
    with detector.capture(backbone) as captured:
        maps(backbone, PLANES)
    found, proposals, loss = detector.train().propose(captured, PLANES, boxes)
    assert [len(own) <= 10 for own in proposals] == [True, True]
    assert loss.item() > 0
    for own, scores in detector.eval().candidates(found, proposals, (_SIDE, _SIDE)):
        assert own.shape == (*scores.shape, 4)
        assert scores.shape[1] == 2
        assert ((own >= 0) & (own <= _SIDE)).all()


def test_a_batch_without_any_box_has_no_loss() -> None:
    backbone = build_backbone("resnet10t", 3).eval()
    detector = PartDetector(find_levels(backbone, 8), 2, width=16, proposals=10).train()
    with detector.capture(backbone) as captured:
        maps(backbone, PLANES)
    _, _, loss = detector.propose(captured, PLANES, torch.full((2, 2, 4), float("nan")))
    assert loss.item() == 0


def test_a_batch_without_any_candidate_has_empty_boxes() -> None:
    backbone = build_backbone("resnet10t", 3).eval()
    detector = PartDetector(find_levels(backbone, 8), 3, width=16, proposals=10).eval()
    with detector.capture(backbone) as captured:
        maps(backbone, PLANES)
    found, proposals, _ = detector.propose(captured, PLANES, None)
    none = [own[:0] for own in proposals]
    for boxes, scores in detector.candidates(found, none, (_SIDE, _SIDE)):
        best = best_configuration(boxes, scores, PositionPrior(2), Constraint(10.0, 0.1, 0.1, 5))
        assert best.shape == (3, 4)
        assert best.isnan().all()
