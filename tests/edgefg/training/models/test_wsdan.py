from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgefg import __version__
from edgefg.errors import DataError, WeightsError
from edgefg.preprocess import InputSpec
from edgefg.settings.split import SplitSpec
from edgefg.settings.training import Schedule, TrainingConfig
from edgefg.training.checkpoint import SCHEMA, Header, load, save
from edgefg.training.loop.optimizer import create_optimizer
from edgefg.training.losses import cross_entropy
from edgefg.training.methods import build
from edgefg.training.models import wsdan as module
from edgefg.training.models.backbone import build_backbone
from edgefg.training.models.network import Batch, mean_logits
from edgefg.training.models.wsdan import WSDAN, Centres, attention_pooling, box_above, crop, keep_below
from tests.edgefg.training.short import losses_of
from tests.edgefg.training.synthetic_parts import experiment, overlap

GRAY = (127.0,) * 3
CRITERION = cross_entropy(0.0)


def wsdan(name: str = "resnet10t", classes: int = 3, **options: Any) -> WSDAN:
    torch.manual_seed(0)
    network = build("wsdan", build_backbone(name, classes), GRAY, GRAY, {"maps": 4, **options})
    assert isinstance(network, WSDAN)
    return network


def pictures(count: int = 4, side: int = 64) -> torch.Tensor:
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def batch(**fields: Any) -> Batch:
    return Batch(pictures(), torch.tensor([0, 2, 2, 1]), **fields)


def block(rows: slice, columns: slice, side: int = 8) -> torch.Tensor:
    found = torch.zeros(1, 1, side, side)
    found[:, :, rows, columns] = 1
    return found


def share(value: float) -> torch.Tensor:
    return torch.full((1, 1, 1, 1), value)


def test_attention_pooling_is_the_mean_of_attention_times_features() -> None:
    random = np.random.default_rng(0)
    attention, found = random.uniform(size=(2, 3, 4, 5)), random.normal(size=(2, 6, 4, 5))
    expected = np.zeros((2, 3, 6))
    for n, m, c, row, column in np.ndindex(2, 3, 6, 4, 5):
        expected[n, m, c] += attention[n, m, row, column] * found[n, c, row, column] / 20
    pooled = attention_pooling(torch.from_numpy(attention), torch.from_numpy(found))
    np.testing.assert_allclose(pooled.numpy(), expected, atol=1e-12)


def test_the_embedding_is_the_rooted_pooling_at_length_100() -> None:
    network = wsdan().eval()
    with torch.no_grad():
        found = network.backbone.forward_features(network.normalised(pictures()))
        pooled = attention_pooling(network.attend(found), found).flatten(1).double().numpy()
        embedded = network.features(pictures()).numpy()
    rooted = np.sqrt(np.maximum(pooled, 0) + 1e-5) - np.sqrt(np.maximum(-pooled, 0) + 1e-5)
    np.testing.assert_allclose(embedded, 100 * rooted / np.linalg.norm(rooted, axis=1, keepdims=True), atol=1e-3)


def test_a_network_without_any_activation_has_a_finite_loss_and_finite_gradients() -> None:
    network = wsdan().train()
    norm: Any = network.attend[1]
    torch.nn.init.zeros_(norm.weight)
    torch.nn.init.constant_(norm.bias, -1.0)
    step = network.loss(batch(), CRITERION)
    step.loss.backward()
    assert torch.count_nonzero(step.embedding) == 0
    # No logits but the bias, and f = 0: the centres' term is 0.
    assert step.loss.item() == pytest.approx(CRITERION(network.head.bias.expand(4, 3), batch()).item(), abs=1e-5)
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())


def test_centres_follow_every_image_of_a_class_once() -> None:
    random = np.random.default_rng(3)
    start, features = random.normal(size=(4, 5)).astype(np.float32), random.normal(size=(6, 5)).astype(np.float32)
    labels = [2, 0, 2, 2, 3, 0]
    centres = Centres(4, 5, 0.05)
    centres.centres.copy_(torch.from_numpy(start))
    term = centres(torch.from_numpy(features), torch.tensor(labels))
    unit = start / np.linalg.norm(start, axis=1, keepdims=True)
    expected, total = start.copy(), 0.0
    for feature, label in zip(features, labels, strict=True):
        total += float(np.sum((feature - unit[label]) ** 2)) / 6
        expected[label] += 0.05 * (feature - unit[label]) / labels.count(label)
    assert term.item() == pytest.approx(total, rel=1e-5)
    np.testing.assert_allclose(centres.centres.numpy(), expected, atol=1e-6)
    np.testing.assert_array_equal(centres.centres[1].numpy(), start[1])


def test_the_centres_pull_features_but_the_optimiser_does_not_move_them() -> None:
    network = wsdan().train()
    network.loss(batch(), CRITERION)
    before = network.centres.centres.clone()
    assert before.any(dim=1).all()
    feature = torch.nn.functional.normalize(torch.rand(1, before.shape[1])).requires_grad_()
    assert network.centres is not None
    network.centres(feature, torch.tensor([1])).backward()
    expected = 2 * (feature - torch.nn.functional.normalize(before[1:2]))
    torch.testing.assert_close(feature.grad, expected.detach())
    groups = create_optimizer(
        network, network.new_modules(), TrainingConfig(image_size=64, schedule=Schedule(epochs=1))
    ).param_groups
    assert all(p is not network.centres.centres for group in groups for p in group["params"])


def test_the_box_of_a_known_map_is_padded_and_stays_inside() -> None:
    # At its own size the map is not blurred: rows 2 to 4 and columns 5 to 7 of 8.
    found = block(slice(2, 5), slice(5, 8))
    np.testing.assert_allclose(box_above(found, share(0.5), 0.0, (8, 8))[0], [5 / 8, 2 / 8, 1, 5 / 8], atol=1e-6)
    np.testing.assert_allclose(box_above(found, share(0.5), 0.1, (8, 8))[0], [0.525, 0.15, 1, 0.725], atol=1e-6)
    # Width and height are not mixed up.
    wide = torch.zeros(1, 1, 4, 10)
    wide[0, 0, 1, 7] = 3
    np.testing.assert_allclose(box_above(wide, share(0.5), 0.0, (4, 10))[0], [0.7, 0.25, 0.8, 0.5], atol=1e-6)


def test_a_box_holds_all_at_or_above_the_share_of_the_maximum() -> None:
    found = torch.tensor([0.1, 0.5, 2.0, 1.0]).view(1, 1, 1, 4)
    for threshold, x0, x1 in ((0.05, 0, 4), (0.1, 1, 4), (0.5, 2, 4), (0.75, 2, 3)):
        np.testing.assert_allclose(box_above(found, share(threshold), 0.0, (1, 4))[0], [x0 / 4, 0, x1 / 4, 1])


def test_boxes_of_a_batch_are_those_of_its_images() -> None:
    found = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    thresholds = torch.linspace(0.3, 0.9, 5).view(5, 1, 1, 1)
    together = box_above(found, thresholds, 0.05, (32, 48))
    for n in range(5):
        torch.testing.assert_close(together[n : n + 1], box_above(found[n : n + 1], thresholds[n], 0.05, (32, 48)))
    enlarged = torch.nn.functional.interpolate(found, (32, 48), mode="bilinear")[2, 0].numpy()
    rows, columns = np.nonzero(enlarged >= float(thresholds[2]) * enlarged.max())
    expected = [columns.min() / 48 - 0.05, rows.min() / 32 - 0.05]
    expected += [(columns.max() + 1) / 48 + 0.05, (rows.max() + 1) / 32 + 0.05]
    np.testing.assert_allclose(together[2], np.clip(expected, 0, 1), atol=1e-6)


def test_what_is_dropped_is_what_is_above_the_threshold() -> None:
    keep = keep_below(block(slice(0, 3), slice(4, 6)), share(0.5), (8, 8))
    assert keep.shape == (1, 1, 8, 8)
    torch.testing.assert_close(keep, 1 - block(slice(0, 3), slice(4, 6)))


def test_a_map_of_zeros_crops_nothing_away_and_drops_nothing() -> None:
    nothing = torch.zeros(1, 1, 4, 4)
    assert box_above(nothing, share(0.5), 0.1, (16, 16)).tolist() == [[0, 0, 1, 1]]
    assert keep_below(nothing, share(0.5), (16, 16)).all()


def test_a_crop_is_the_enlarged_slice() -> None:
    planes = torch.rand(2, 3, 16, 32, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[0.25, 0.5, 0.75, 1.0], [0.0, 0.0, 1.0, 1.0]])
    found = crop(planes, boxes)
    torch.testing.assert_close(found[1], planes[1], atol=1e-5, rtol=0)
    slice_ = torch.nn.functional.interpolate(planes[:1, :, 8:, 8:24], (16, 32), mode="bilinear")
    # At the slice's border grid_sample also sees the pixel beside it.
    torch.testing.assert_close(found[:1, :, 1:-1, 1:-1], slice_[..., 1:-1, 1:-1], atol=1e-5, rtol=0)


def test_mixed_precision_leaves_crops_as_sharp_as_they_are() -> None:
    planes, boxes = torch.rand(1, 3, 300, 300), torch.tensor([[0.21, 0.33, 0.77, 0.91]])
    expected = crop(planes, boxes)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(crop(planes, boxes), expected)


def test_the_map_is_drawn_by_the_root_of_its_strength() -> None:
    network = wsdan(drop_low=0.5, drop_high=0.5).eval()
    # Of mean 1/16 · (0, 1, 4, 9): drawn with 0, 1/6, 2/6 and 3/6. Each lights another row.
    attention = torch.zeros(6000, 4, 4, 4)
    for m in range(4):
        attention[:, m, m, 0] = m**2
    torch.manual_seed(0)
    planes = torch.ones(6000, 1, 4, 4)
    crops, dropped = network._augmented(planes, attention)
    assert crops.shape == planes.shape
    hidden = (dropped == 0).float()
    assert hidden.sum(dim=(1, 2, 3)).tolist() == [1.0] * 6000
    np.testing.assert_allclose(hidden[:, 0, :, 0].mean(dim=0), [0, 1 / 6, 2 / 6, 3 / 6], atol=0.025)


def test_thresholds_are_drawn_for_each_image_from_their_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, torch.Tensor] = {}
    box, keep = module.box_above, module.keep_below
    monkeypatch.setattr(module, "box_above", lambda m, t, p, s: (drawn.update(crop=t, padding=p), box(m, t, p, s))[1])
    monkeypatch.setattr(module, "keep_below", lambda m, t, s: (drawn.update(drop=t), keep(m, t, s))[1])
    wsdan().train()._augmented(torch.ones(200, 3, 8, 8), torch.rand(200, 4, 2, 2))
    for name, low, high in (("crop", 0.4, 0.6), ("drop", 0.2, 0.5)):
        assert low <= drawn[name].min() < low + 0.02
        assert high - 0.02 < drawn[name].max() <= high
    assert drawn["padding"] == 0.1


def test_the_loss_is_the_mean_over_raw_crop_and_drop_plus_the_centres_term() -> None:
    seen: list[torch.Tensor] = []

    def criterion(logits: torch.Tensor, given: Batch) -> torch.Tensor:
        seen.append(CRITERION(logits, given))
        return seen[-1]

    step = wsdan(centre_weight=0.5).train().loss(batch(), criterion)
    assert len(seen) == 3
    assert len({round(value.item(), 4) for value in seen}) == 3
    # The centres start at 0, so the term is ‖f‖² = 1.
    assert step.loss.item() == pytest.approx(sum(value.item() for value in seen) / 3 + 0.5, abs=1e-5)
    torch.testing.assert_close(step.embedding.norm(dim=1), torch.full((4,), 100.0))


def test_mixed_images_have_no_centres_term_and_move_no_centre() -> None:
    network = wsdan().train()
    targets = torch.full((4, 3), 1 / 3)
    torch.manual_seed(1)
    mixed = network.loss(batch(targets=targets), CRITERION)
    assert not network.centres.centres.any()
    without = wsdan(centre_weight=0).train()
    assert without.centres is None
    torch.manual_seed(1)
    assert mixed.loss.item() == pytest.approx(without.loss(batch(targets=targets), CRITERION).loss.item(), abs=1e-6)


def test_the_prediction_is_the_mean_of_both_softmaxes() -> None:
    logits = [torch.tensor([[1.0, 2.0, -50.0]]), torch.tensor([[0.0, -3.0, -200.0]])]
    powers = [np.exp(x.double().numpy()) for x in logits]
    expected = sum(power / power.sum() for power in powers) / 2
    np.testing.assert_allclose(mean_logits(logits).softmax(dim=1), expected, rtol=1e-5)
    network = wsdan(test_threshold=0.9).eval()
    with torch.no_grad():
        both = network(pictures())
        boxes = network.attention(pictures()).boxes
        assert boxes is not None
        assert ((boxes[:, 0, 2:] - boxes[:, 0, :2]) < 0.95).any()
        planes = network.normalised(pictures())
        passes = [network._run(p).logits.softmax(dim=1) for p in (planes, crop(planes, boxes[:, 0]))]
        torch.testing.assert_close(both.softmax(dim=1), (passes[0] + passes[1]) / 2)
        torch.testing.assert_close(both.exp().sum(dim=1), torch.ones(4))
        assert not torch.allclose(passes[0], passes[1])
        single = wsdan(passes=1).eval()(pictures()).softmax(dim=1)
    torch.testing.assert_close(single, passes[0])


def test_attention_gives_the_mean_map_the_maps_and_the_box_of_the_mean() -> None:
    network = wsdan().eval()
    found = network.attention(pictures())
    assert found.maps is not None
    assert found.maps.shape == (4, 5, 2, 2)
    assert found.maps.min() >= 0
    assert found.maps.max() <= 1
    assert found.names == ("crop",)
    with torch.no_grad():
        maps = network.attend(network.backbone.forward_features(network.normalised(pictures())))
    expected = box_above(maps.mean(dim=1, keepdim=True), torch.full((4, 1, 1, 1), 0.1), 0.05, (64, 64))
    torch.testing.assert_close(found.boxes, expected[:, None])


@pytest.mark.parametrize("name", ["resnet10t", "tf_efficientnet_lite0", "torchvision:alexnet", "torchvision:resnet18"])
def test_every_weight_learns_and_a_checkpoint_gives_the_network_back(name: str, tmp_path: Path) -> None:
    network = wsdan(name).train()
    step = network.loss(batch(), CRITERION)
    step.loss.backward()
    assert [key for key, p in network.named_parameters() if p.grad is None] == []
    assert step.logits.shape == (4, 3)
    new_modules = {id(p) for part in network.new_modules() for p in part.parameters()}
    assert new_modules == {id(p) for key, p in network.named_parameters() if not key.startswith("backbone.")}
    header = Header(
        schema=SCHEMA,
        kind="teacher",
        method="wsdan",
        options={"maps": 4},
        backbone=name,
        labels=("a", "b", "c"),
        input=InputSpec(height=64, width=64),
        mean=GRAY,
        std=GRAY,
        dataset="d",
        split=SplitSpec(),
        edgefg=__version__,
    )
    save(tmp_path / "teacher.safetensors", network, header)
    loaded, _ = load(tmp_path / "teacher.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(pictures()), network.eval()(pictures()))
    assert torch.equal(loaded.state_dict()["centres.centres"], network.centres.centres)


@pytest.mark.parametrize("name", ["torchvision:vgg11", "vgg11"])
def test_the_hidden_layers_of_a_vgg_head_go_as_well(name: str) -> None:
    network = wsdan(name)
    # 9 million of 129.
    assert sum(p.numel() for p in network.backbone.parameters()) < 10_000_000


def test_building_leaves_pretrained_statistics_alone() -> None:
    backbone = build_backbone("resnet10t", 3)
    before = {key: value.clone() for key, value in backbone.state_dict().items() if "running" in key}
    after = build("wsdan", backbone, GRAY, GRAY, {}).backbone.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_a_transformer_is_refused() -> None:
    with pytest.raises(WeightsError, match="Use a convolutional backbone"):
        wsdan("vit_tiny_patch16_224")


@pytest.mark.parametrize(
    ("options", "said"),
    [({"maps": 0}, "maps"), ({"crop_low": 0.7}, "crop_low 0.7 is greater than crop_high 0.6"), ({"theta": 1}, "theta")],
)
def test_wrong_options_are_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        wsdan(**options)


@pytest.mark.slow
def test_training_lowers_the_loss(birds: Path, tmp_path: Path) -> None:
    losses = losses_of(birds, tmp_path, "wsdan", maps=4)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.slow
def test_the_crop_finds_the_telling_part_and_more_birds_are_known_than_by_fine_tuning(tmp_path: Path) -> None:
    # Small birds anywhere. 0.6 instead of the paper's 0.1, which on maps of 4 × 4 leaves most of the image.
    config = TrainingConfig(image_size=128, schedule=Schedule(epochs=10, batch_size=16, val_every=10))
    plain = experiment(tmp_path, config, method="plain")
    attentive = experiment(tmp_path, config, method="wsdan", options={"test_threshold": 0.6})
    looked = attentive.boxes["crop"]
    assert looked.found.hit > 0.9
    assert looked.found.hit > looked.chance.hit + 0.3
    assert looked.found.covered > looked.middle.covered + 0.15
    assert attentive.test > plain.test + 0.03


def test_overlap_of_known_boxes() -> None:
    marks = np.array([[0.4, 0.4, 0.6, 0.6]] * 3)
    found = np.array([[0.5, 0.4, 0.9, 0.6], [0.0, 0.0, 1.0, 1.0], [np.nan] * 4])
    result = overlap(found, marks)
    assert result.iou == pytest.approx((0.02 / 0.1 + 0.04 + 0) / 3)
    assert result.hit == pytest.approx(2 / 3)
    assert result.covered == pytest.approx((0.5 + 1 + 0) / 3)
    assert result.area == pytest.approx((0.08 + 1 + 0) / 3)
