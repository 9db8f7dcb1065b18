from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgefg.data import load_dataset
from edgefg.errors import DataError
from edgefg.preprocess import InputSpec
from edgefg.settings.hardware import Hardware
from edgefg.settings.split import SplitSpec
from edgefg.settings.training import FineTuning, Schedule, TrainingConfig
from edgefg.training.checkpoint import SCHEMA, Header, load, save
from edgefg.training.data.augment import EvaluationImages
from edgefg.training.data.loader import evaluation_loader
from edgefg.training.loop.optimizer import create_optimizer, freeze
from edgefg.training.losses import cross_entropy
from edgefg.training.methods import build
from edgefg.training.models.backbone import IMAGENET_MEAN, IMAGENET_STD, build_backbone
from edgefg.training.models.network import Batch
from edgefg.training.models.racnn import (
    RACNN,
    Phase,
    ProposalNetwork,
    RACNNOptions,
    boxcar,
    peak_box,
    phase_of,
    rank_loss,
    true_probability,
    within,
    zoom,
)
from edgefg.training.teacher import train_teacher
from edgefg.training.weights import load_backbone
from tests.edgefg.training.synthetic_parts import LITE0, attended, compare, part_boxes
from tests.synthetic import write_dataset

CRITERION = cross_entropy(0.0)
BACKBONES = ("test_efficientnet", "torchvision:mobilenet_v2")


def network(backbone: str = "test_efficientnet", **options: Any) -> RACNN:
    torch.manual_seed(0)
    built = build("racnn", build_backbone(backbone, 3), IMAGENET_MEAN, IMAGENET_STD, options)
    assert isinstance(built, RACNN)
    return built


def batch(seed: int = 0, count: int = 4, side: int = 64) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=generator)
    return Batch(images, torch.arange(count) % 3)


def begin(net: RACNN, phase: Phase) -> None:
    """As the loop does, at an epoch of that phase."""
    net.train()
    freeze(net, net.new_modules(), False)
    epoch = next(epoch for epoch in range(20) if phase_of(epoch, 20, RACNNOptions()) is phase)
    net.begin_epoch(epoch, 20)
    assert net.phase is phase


def settle_norms(net: RACNN) -> None:
    """Give the norms a batch's statistics: those of an untrained network let signals, and gradients, die out."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    net.train()
    net(batch().images)


def test_the_mask_is_the_papers_formula() -> None:
    (tx, ty, tl), k, height, width = (0.4, 0.55, 0.2), 1.7, 11, 17

    def h(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-k * x))

    x, y = (np.arange(width) + 0.5)[None, :], (np.arange(height) + 0.5)[:, None]
    along_x = h(x - (tx - tl) * width) - h(x - (tx + tl) * width)
    along_y = h(y - (ty - tl) * height) - h(y - (ty + tl) * height)
    mask = boxcar(torch.tensor([[tx, ty, tl]]), height, width, k)
    assert mask.shape == (1, 1, height, width)
    np.testing.assert_allclose(mask[0, 0].numpy(), along_x * along_y, atol=1e-6)


def test_a_crop_of_its_own_size_is_the_plain_slice() -> None:
    planes = torch.rand(2, 3, 32, 40)
    boxes = torch.tensor([[0.5, 0.375, 0.25], [0.25, 0.5, 0.25]])
    crops = zoom(planes, boxes, (16, 20), k=50.0)
    torch.testing.assert_close(crops[0], planes[0, :, 4:20, 10:30], atol=1e-4, rtol=0)
    torch.testing.assert_close(crops[1], planes[1, :, 8:24, 0:20], atol=1e-4, rtol=0)


def test_a_crop_is_zoomed_as_a_resize_of_the_slice() -> None:
    planes = torch.rand(1, 3, 32, 32)
    crop = zoom(planes, torch.tensor([[0.5, 0.375, 0.25]]), (64, 64), k=10.0)
    resized = nn.functional.interpolate(planes[:, :, 4:20, 8:24], (64, 64), mode="bilinear", align_corners=False)
    # The outermost source pixel fades into the masked outside, which a resize of the slice does not know.
    inner = (..., slice(6, -6), slice(6, -6))
    torch.testing.assert_close(crop[inner], resized[inner], atol=1e-4, rtol=0)


def test_a_box_within_a_box_is_the_crop_of_the_crop() -> None:
    planes = torch.rand(1, 1, 64, 64)
    outer, inner = torch.tensor([[0.5, 0.5, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    twice = zoom(zoom(planes, outer, (32, 32), 50.0), inner, (16, 16), 50.0)
    torch.testing.assert_close(within(outer, inner), torch.tensor([[0.375, 0.5, 0.125]]))
    torch.testing.assert_close(twice, zoom(planes, within(outer, inner), (16, 16), 50.0), atol=1e-3, rtol=0)


def test_mixed_precision_leaves_boxes_and_crops_as_sharp_as_they_are() -> None:
    planes, box = torch.rand(1, 3, 300, 300), torch.tensor([[0.51, 0.43, 0.22]])
    expected = zoom(planes, box, (300, 300), 10.0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(zoom(planes, box, (300, 300), 10.0), expected)
        assert ProposalNetwork(8, RACNNOptions())(torch.rand(2, 8, 3, 3)).dtype == torch.float32


def test_the_rank_loss_by_hand() -> None:
    coarse, middle, fine = torch.tensor([0.5, 0.2]), torch.tensor([0.6, 0.2]), torch.tensor([0.3, 0.9])
    # Image 1: 0.5 - 0.6 + 0.05 < 0, then 0.6 - 0.3 + 0.05 = 0.35; image 2: 0.05, then 0.2 - 0.9 + 0.05 < 0.
    assert rank_loss([coarse, middle, fine], 0.05).item() == pytest.approx((0.35 + 0.05) / 2)


def test_the_rank_loss_only_ever_makes_the_finer_scale_surer() -> None:
    coarse, fine = torch.tensor([0.5], requires_grad=True), torch.tensor([0.4], requires_grad=True)
    rank_loss([coarse, fine], 0.05).backward()
    assert coarse.grad is None
    assert fine.grad is not None
    assert fine.grad.item() == -1.0


def test_the_true_class_is_ranked_by_probability_also_of_mixed_images() -> None:
    logits = torch.tensor([[0.0, 2.0, -1.0], [3.0, 3.0, 0.0]])
    plain = Batch(torch.empty(0), torch.tensor([1, 0]))
    share = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(true_probability(logits, plain).numpy(), [share[0, 1], share[1, 0]], rtol=1e-6)
    targets = torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.5, 0.5]])
    mixed = plain._replace(targets=targets)
    expected = (share * targets.numpy()).sum(axis=1)
    np.testing.assert_allclose(true_probability(logits, mixed).numpy(), expected, rtol=1e-6)


def test_an_untrained_proposal_is_the_centre_and_any_other_stays_inside_above_the_floor() -> None:
    torch.manual_seed(0)
    proposal = ProposalNetwork(8, RACNNOptions(grid=2, hidden=4))
    torch.testing.assert_close(proposal(torch.rand(2, 8, 3, 3)), torch.tensor([[0.5, 0.5, 0.25]] * 2))
    for scale in (1.0, 50.0):
        nn.init.normal_(proposal.second.weight, std=scale)
        box = proposal(torch.randn(200, 8, 5, 5))
        centre, half = box[:, :2], box[:, 2:]
        assert (centre - half >= -1e-6).all()
        assert (centre + half <= 1 + 1e-6).all()
        # tl is half the side: a side of a third is 1/6.
        assert (half >= 1 / 6 - 1e-6).all()
    assert half.min().item() == pytest.approx(1 / 6, abs=1e-4)
    assert half.max().item() == pytest.approx(1 / 2, abs=1e-4)


def test_the_peak_is_the_most_responsive_box_of_half_the_side() -> None:
    maps = torch.zeros(3, 2, 8, 8)
    maps[0, :, 0, 0] = 1  # a corner: the box touches it and stays inside
    maps[1, :, 5:7, 1:3] = 1
    maps[2, 0, 3:5, 3:5], maps[2, 1, 7, 7] = 1, 1.5  # more in sum around the centre
    boxes = peak_box(maps)
    torch.testing.assert_close(boxes[0], torch.tensor([0.25, 0.25, 0.25]))
    x0, y0, x1, y1 = (*(boxes[1, :2] - 0.25).tolist(), *(boxes[1, :2] + 0.25).tolist())
    assert x0 <= 1 / 8 < 3 / 8 <= x1
    assert y0 <= 5 / 8 < 7 / 8 <= y1
    assert (boxes[2, :2] - 0.25 <= 3 / 8).all()


@pytest.mark.parametrize("k", [10.0, 0.5])
def test_the_box_moves_towards_what_tells(k: float) -> None:
    """A frozen classifier is sure of bright pixels; the blob lies across the right edge of the box."""
    planes = torch.zeros(1, 1, 32, 32)
    planes[:, :, 12:20, 22:26] = 5.0
    box = torch.tensor([[0.5, 0.5, 0.25]], requires_grad=True)

    def probability(at: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(zoom(planes, at, (16, 16), k).mean(dim=(1, 2, 3)))

    rank_loss([torch.tensor([0.9]), probability(box)], 0.05).backward()
    assert box.grad is not None
    assert box.grad[0, 0] < -1e-4
    assert abs(box.grad[0, 1]) < abs(box.grad[0, 0]) / 10
    moved = (box - 0.02 * box.grad.sign() * torch.tensor([1.0, 0.0, 0.0])).detach()
    assert probability(moved) > probability(box)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_rank_loss_teaches_both_proposal_networks_and_nothing_else(backbone: str) -> None:
    net = network(backbone, margin=0.5)
    settle_norms(net)
    begin(net, Phase.RANK)
    before = {name: value.clone() for name, value in net.named_buffers()}
    step = net.loss(batch(), CRITERION)
    step.loss.backward()
    for proposal in net.proposals:
        assert proposal.second.weight.grad.abs().max() > 1e-8
    assert all(p.grad is None for name, p in net.named_parameters() if not name.startswith("proposals"))
    assert all(torch.equal(value, before[name]) for name, value in net.named_buffers()), "frozen norms learned"
    assert step.logits.shape == (4, 3)


def test_the_peak_phase_brings_the_boxes_to_the_peaks() -> None:
    net = network()
    begin(net, Phase.PEAK)
    optimizer = torch.optim.Adam(net.proposals.parameters(), 1e-2)
    data = batch()
    losses = []
    for _ in range(40):
        loss = net.loss(data, CRITERION).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert all(p.grad is None for name, p in net.named_parameters() if not name.startswith("proposals"))


@pytest.mark.parametrize(("fusion", "terms"), [("mean", 3), ("learned", 4)])
def test_the_classify_phase_sums_all_cross_entropies_and_leaves_the_proposals(fusion: str, terms: int) -> None:
    net = network(fusion=fusion)
    begin(net, Phase.CLASSIFY)
    seen: list[float] = []

    def counting(logits: torch.Tensor, data: Batch) -> torch.Tensor:
        loss = CRITERION(logits, data)
        seen.append(loss.item())
        return loss

    step = net.loss(batch(), counting)
    assert len(seen) == terms
    assert step.loss.item() == pytest.approx(sum(seen), rel=1e-5)
    step.loss.backward()
    assert all((p.grad is None) == name.startswith("proposals") for name, p in net.named_parameters())


def test_the_phases_go_by_turns_and_end_with_the_classifiers() -> None:
    phases = [phase_of(epoch, 12, RACNNOptions(warm_share=0)) for epoch in range(12)]
    later = [Phase.CLASSIFY] * 10
    later[2] = later[6] = Phase.RANK
    assert phases == [Phase.PEAK] * 2 + later
    usual = [phase_of(epoch, 10, RACNNOptions()) for epoch in range(10)]
    assert usual == [Phase.CLASSIFY] * 4 + [Phase.PEAK] * 2 + [Phase.CLASSIFY] * 4
    warm = [phase_of(epoch, 10, RACNNOptions(warm_share=0.3, rank_share=0.5)) for epoch in range(10)]
    assert warm[:5] == [Phase.CLASSIFY] * 3 + [Phase.PEAK] * 2
    assert warm[5:] == [Phase.CLASSIFY, Phase.RANK] * 2 + [Phase.CLASSIFY]
    assert phase_of(2, 10, RACNNOptions()) is Phase.CLASSIFY, "the rank loss before the classifiers knew anything"
    counted = [epoch for epoch in range(10) if network().classifies_in(epoch, 10)]
    assert counted == [6, 7, 8, 9], "patience would end a run before its proposals learn"
    for epochs in range(1, 9):
        assert phase_of(epochs - 1, epochs, RACNNOptions()) is Phase.CLASSIFY
    without = RACNNOptions(peak_share=0, rank_share=0)
    assert {phase_of(epoch, 12, without) for epoch in range(12)} == {Phase.CLASSIFY}


def test_a_frozen_start_stays_frozen() -> None:
    net = network(fusion="learned")
    net.train()
    freeze(net, net.new_modules(), True)
    net.begin_epoch(2, 10)
    assert net.phase.name == "CLASSIFY"
    assert not net.backbone.conv_stem.weight.requires_grad
    assert net.fusion.weight.requires_grad
    net.loss(batch(), CRITERION).loss.backward()
    freeze(net, net.new_modules(), True)
    net.begin_epoch(4, 10)
    assert net.phase is Phase.PEAK
    net.loss(batch(), CRITERION).loss.backward()
    assert net.proposals[0].second.weight.grad is not None


def test_every_parameter_learns_in_some_phase_and_the_fusion_faster() -> None:
    net = network(fusion="learned")
    optimizer = create_optimizer(
        net,
        net.new_modules(),
        TrainingConfig(image_size=64, schedule=Schedule(epochs=10), fine_tuning=FineTuning(head_lr_ratio=7.0)),
    )
    fast = {id(p) for group in optimizer.param_groups if group["ratio"] == 7.0 for p in group["params"]}
    assert {id(p) for p in net.fusion.parameters()} <= fast
    assert not {id(p) for p in net.proposals.parameters()} & fast
    learned: set[str] = set()
    for phase in Phase:
        begin(net, phase)
        net.zero_grad()
        net.loss(batch(), CRITERION).loss.backward()
        learned |= {name for name, p in net.named_parameters() if p.grad is not None}
    assert learned == {name for name, _ in net.named_parameters()}


def test_finer_backbones_start_as_copies_of_their_own_or_are_shared() -> None:
    net = network()
    for finer in net.finer:
        for own, other in zip(finer.parameters(), net.backbone.parameters(), strict=True):
            assert torch.equal(own, other)
            assert own is not other
    assert not list(network(shared=True).finer.parameters())


@pytest.mark.parametrize("options", [{}, {"shared": True, "size2": 1.0, "size3": 0.75}])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_checkpoint_gives_the_same_network(backbone: str, options: dict, tmp_path: Path) -> None:
    net = network(backbone, **options)
    nn.init.normal_(net.proposals.get_parameter("0.second.weight"))
    header = Header(
        schema=SCHEMA, kind="teacher", method="racnn", backbone=backbone, labels=("a", "b", "c"),
        options={name: getattr(net.options, name) for name in RACNNOptions.__struct_fields__},
        input=InputSpec(height=64, width=64), mean=IMAGENET_MEAN, std=IMAGENET_STD, dataset="none", split=SplitSpec(),
        edgefg="test",
    )  # fmt: skip
    save(tmp_path / "net.safetensors", net, header)
    again, _ = load(tmp_path / "net.safetensors")
    net.eval()
    images = batch().images
    assert net(images).shape == (4, 3)
    assert torch.equal(again(images), net(images))
    boxes, expected = again.attention(images).boxes, net.attention(images).boxes
    assert boxes is not None
    assert expected is not None
    assert torch.equal(boxes, expected)


def test_attention_names_boxes_in_shares_of_the_whole_image() -> None:
    net = network().eval()
    found = net.attention(batch(side=48).images)
    assert found.names == ("scale 2", "scale 3")
    # Untrained: the centre, and the centre of the centre.
    expected = torch.tensor([[0.25, 0.25, 0.75, 0.75], [0.375, 0.375, 0.625, 0.625]])
    torch.testing.assert_close(found.boxes, expected.expand(4, 2, 4))
    assert found.maps is not None
    assert found.maps.amin() == 0
    assert found.maps.amax() == 1
    assert found.maps.shape[:2] == (4, 1)


def test_options_out_of_range_are_one_line() -> None:
    for wrong in ({"floor": 0.9}, {"size2": 2.0}, {"rank_share": 1.0}, {"zoom": 2}):
        with pytest.raises(DataError, match="invalid option of racnn"):
            network(**wrong)


def test_it_trains_by_the_loop_and_resumes_equally(
    birds: Path, tmp_path: Path, hardware: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgefg.training.loop import fit as loop

    config = TrainingConfig(image_size=32, schedule=Schedule(epochs=6, batch_size=27, lr=1e-3))
    options = {"size2": 1.0, "size3": 1.0, "hidden": 8, "grid": 2, "warm_share": 0.0}
    assert {phase_of(epoch, 6, RACNNOptions(warm_share=0)) for epoch in range(6)} == set(Phase)

    def run(out: Path) -> Path:
        return train_teacher(
            birds, out, config, backbone="test_efficientnet", method="racnn", options=options, weights="none",
            hardware=hardware,
        )  # fmt: skip

    whole = run(tmp_path / "whole")
    epoch = loop._Loop.epoch

    def killed(self: Any, training: Any, progress: Any, *args: Any) -> float:
        if progress.epochs_done == 4:
            raise KeyboardInterrupt
        return epoch(self, training, progress, *args)

    monkeypatch.setattr(loop._Loop, "epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut")
    monkeypatch.undo()
    assert run(tmp_path / "cut").read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_the_peak_of_pretrained_maps_brings_the_crop_onto_the_telling_part(tmp_path: Path) -> None:
    """On birds half as long as the image and anywhere in it: above a box anywhere, and one in the middle."""
    root = write_dataset(tmp_path, classes=4, per_class=60, size=192, seed=2, far=True)
    splits = load_dataset(root).splits
    spec = InputSpec(height=128, width=128)
    torch.manual_seed(0)
    net = RACNN(*load_backbone(LITE0[0], 4, LITE0[1]), RACNNOptions(size2=1.0, size3=1.0))
    begin(net, Phase.PEAK)
    optimizer = torch.optim.AdamW(net.proposals.parameters(), 1e-3)
    seen = list(evaluation_loader(EvaluationImages(splits["train"], spec), 16, workers=0))
    for _ in range(4):
        for images, labels in seen:
            loss = net.loss(Batch(images, labels), CRITERION).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    net.eval()
    marks = part_boxes(root, splits["test"], 192)
    looked = {name: compare(boxes, marks) for name, boxes in attended(net, splits["test"], spec).items()}
    coarse = looked["scale 2"]
    assert coarse.found.hit > 0.9
    assert coarse.found.hit > coarse.chance.hit + 0.3
    assert coarse.found.iou > 1.5 * coarse.chance.iou
    assert coarse.found.covered > coarse.middle.covered
    fine = looked["scale 3"]
    assert fine.found.hit > fine.chance.hit + 0.3
