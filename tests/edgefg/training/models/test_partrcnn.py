from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from edgefg import __version__
from edgefg.data import load_dataset
from edgefg.data.boxes import choose_parts
from edgefg.errors import DataError, TrainingError
from edgefg.preprocess import InputSpec
from edgefg.settings.split import SplitSpec
from edgefg.settings.training import Augmentation, Schedule, TrainingConfig
from edgefg.training.checkpoint import SCHEMA, Header, load, save
from edgefg.training.data.augment import TrainingImages
from edgefg.training.data.loader import collate
from edgefg.training.losses import cross_entropy
from edgefg.training.methods import build, method_options
from edgefg.training.models.backbone import IMAGENET_MEAN, IMAGENET_STD, build_backbone
from edgefg.training.models.network import Batch, Network
from edgefg.training.models.partrcnn import PartRCNN, PartRCNNOptions
from edgefg.training.objective import TeacherObjective
from tests.edgefg.training.synthetic_parts import experiment, localised
from tests.synthetic import write_dataset

_SIDE = 64
_PARTS = "object,head,mark"
_NAN = float("nan")


def _network(backbone: str = "resnet10t", **options: Any) -> PartRCNN:
    torch.manual_seed(0)
    values = {"parts": _PARTS, "region_size": 0.5, "width": 16, "proposals": 20} | options
    network = build("partrcnn", build_backbone(backbone, 3), IMAGENET_MEAN, IMAGENET_STD, values)
    assert isinstance(network, PartRCNN)
    return network


@pytest.fixture(scope="module")
def batch(birds: Path) -> Batch:
    data = load_dataset(birds)
    assert data.boxes is not None
    boxes = choose_parts(data.parts, data.boxes, tuple(_PARTS.split(",")))
    samples = data.splits["train"][::7]
    images = TrainingImages(samples, InputSpec(height=_SIDE, width=_SIDE), boxes=boxes)
    torch.manual_seed(0)
    return collate([images[i] for i in range(len(images))])


def test_localised_by_hand() -> None:
    true = np.array([[0, 0, 0.4, 0.4], [0, 0, 0.4, 0.4], [0, 0, 0.4, 0.4], [_NAN] * 4])
    found = np.array([[0, 0, 0.4, 0.2], [0, 0, 0.4, 0.19], [_NAN] * 4, [0, 0, 1, 1]])
    assert localised(found, true) == pytest.approx(1 / 3)  # IoU ½ counts; an invisible part is not asked for


@pytest.mark.parametrize("regions", ["image", "maps"])
@pytest.mark.parametrize("backbone", ["resnet10t", "tf_efficientnet_lite0", "torchvision:resnet18"])
def test_every_parameter_learns_and_outputs_have_their_shapes(batch: Batch, backbone: str, regions: str) -> None:
    network = _network(backbone, regions=regions).train()
    step = network.loss(batch, cross_entropy(0.1))
    step.loss.backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []
    assert step.logits.shape == (len(batch.images), 3)
    network.eval()
    with torch.no_grad():
        logits, vectors = network(batch.images), network.features(batch.images)
        seen = network.attention(batch.images)
    assert logits.shape == step.logits.shape
    assert vectors.shape == step.embedding.shape
    assert seen.names == ("object", "head", "mark")
    assert seen.boxes is not None
    assert seen.boxes.shape == (len(batch.images), 3, 4)
    known = seen.boxes[~seen.boxes.isnan()]
    assert ((known >= 0) & (known <= 1)).all()


def test_absent_parts_add_zeros_and_an_absent_object_is_the_whole_image(batch: Batch) -> None:
    network = _network(context=0.0).eval()
    images = network.normalised(batch.images[:2])
    boxes = torch.tensor([[[0.0, 0, _SIDE, _SIDE], [_NAN] * 4, [8, 8, 24, 24]], [[_NAN] * 4] * 3])
    with torch.no_grad():
        object_, head, mark = network._embed(images, images, boxes).chunk(3, dim=1)
        whole = torch.tensor([[[0.0, 0, _SIDE, _SIDE]] * 3] * 2)
        torch.testing.assert_close(object_, network._embed(images, images, whole).chunk(3, dim=1)[0])
    assert not head.any()
    assert mark[0].any()
    assert not mark[1].any()


def test_a_batch_in_which_no_part_is_visible_trains(batch: Batch) -> None:
    network = _network().train()
    assert batch.boxes is not None
    step = network.loss(batch._replace(boxes=torch.full_like(batch.boxes, _NAN)), cross_entropy(0.0))
    assert math.isfinite(step.loss.item())
    assert not network.prior.count.any()


def test_images_without_boxes_teach_the_detector_nothing(batch: Batch) -> None:
    """Nobody marked what is in them: their anchors are not background."""
    network = _network().eval()  # the norms' statistics of a batch would tie its images together
    network.detector.proposer.train()
    network.detector.heads.train()
    assert batch.boxes is not None
    planes = network.normalised(batch.images)

    def loss_of(boxes: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)  # torchvision samples the anchors
        return network._detect(planes, boxes)[2]

    assert loss_of(torch.full_like(batch.boxes, _NAN)).item() == 0
    one = torch.full_like(batch.boxes, _NAN)
    one[0] = batch.boxes[0]
    found = loss_of(one)
    assert found.item() > 0
    planes[1:] = 0
    assert loss_of(one).item() == pytest.approx(found.item(), rel=1e-4)
    assert loss_of(batch.boxes).item() != pytest.approx(found.item(), rel=1e-2)


def test_prepare_says_how_many_images_have_no_object(birds: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = load_dataset(birds)
    assert data.boxes is not None
    PartRCNN.prepare(method_options("partrcnn", {}), data)
    assert caplog.messages == []
    training = [sample.path for sample in data.splits["train"]]
    boxes = {path: found.copy() for path, found in data.boxes.items() if path not in training[:3]}
    boxes[training[3]][data.parts.index("object")] = _NAN
    _, used = PartRCNN.prepare(method_options("partrcnn", {}), replace(data, boxes=boxes))
    assert used.boxes is not None
    assert not set(training[:4]) & set(used.boxes)
    (line,) = caplog.messages
    assert f"4 of {len(training)} training images have no box of 'object' (first: train/" in line
    boxes = {path: found for path, found in boxes.items() if path not in training}
    with pytest.raises(DataError, match=r"none of the \d+ training images of .* has a box of 'object'\. Add some"):
        PartRCNN.prepare(method_options("partrcnn", {}), replace(data, boxes=boxes))


def test_the_loss_falls(batch: Batch) -> None:
    network = _network(detected=0.0).train()
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    torch.manual_seed(0)
    losses = []
    for _ in range(10):
        step = network.loss(batch, cross_entropy(0.0))
        optimizer.zero_grad()
        step.loss.backward()
        optimizer.step()
        losses.append(step.loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.slow
def test_mixed_precision_leaves_the_boxes_as_sharp_as_they_are(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    network = _network().train()
    kinds: list[torch.dtype] = []
    candidates = network.detector.candidates

    def spied(*args: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
        found = candidates(*args)
        kinds.extend(tensor.dtype for tensor in (*args[1], *(tensor for own in found for tensor in own)))
        return found

    monkeypatch.setattr(network.detector, "candidates", spied)
    with torch.autocast("cpu", torch.bfloat16):
        step = network.loss(batch, cross_entropy(0.0))
    assert set(kinds) == {torch.float32}
    assert step.logits.dtype == torch.bfloat16, "nothing was mixed"
    step.loss.backward()


def test_checkpoint_round_trip(batch: Batch, tmp_path: Path) -> None:
    network = _network()
    network.prior.update(batch.boxes)  # type: ignore[arg-type]
    header = Header(
        schema=SCHEMA,
        kind="teacher",
        method="partrcnn",
        options={name: getattr(network.options, name) for name in network.options.__struct_fields__},
        backbone="resnet10t",
        labels=("a", "b", "c"),
        input=InputSpec(height=_SIDE, width=_SIDE),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        dataset="",
        split=SplitSpec(),
        edgefg=__version__,
    )
    save(tmp_path / "t.safetensors", network, header)
    again, _ = load(tmp_path / "t.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(again(batch.images), network.eval()(batch.images))


def test_prepare_takes_parts_and_boxes_from_the_data(birds: Path) -> None:
    data = load_dataset(birds)
    options, used = PartRCNN.prepare(method_options("partrcnn", {}), data)
    assert isinstance(options, PartRCNNOptions)
    assert options.parts == ",".join(data.parts)
    options, used = PartRCNN.prepare(method_options("partrcnn", {"parts": "mark, object"}), data)
    assert used.parts == ("object", "mark")
    assert used.boxes is not None
    assert next(iter(used.boxes.values())).shape == (2, 4)
    options, used = Network.prepare(method_options("plain", {}), data)
    assert (used.parts, used.boxes) == ((), None)


def test_what_is_missing_is_said(birds: Path, batch: Batch, tmp_path: Path) -> None:
    data = load_dataset(birds)
    with pytest.raises(DataError, match="no boxes of the part 'beek'"):
        PartRCNN.prepare(method_options("partrcnn", {"parts": "object,beek"}), data)
    bare = write_dataset(tmp_path / "bare", classes=2, per_class=3, size=32)
    (bare / "boxes.csv").unlink()
    with pytest.raises(DataError, match=r"has no boxes\.csv, which partrcnn needs"):
        PartRCNN.prepare(method_options("partrcnn", {}), load_dataset(bare))
    for parts in ("", "head,mark"):
        with pytest.raises(DataError, match="Give 'object'"):
            _network(parts=parts)
    with pytest.raises(DataError, match="a part twice"):
        _network(parts="object,head,head")
    with pytest.raises(DataError, match="the batch has no boxes"):
        _network().loss(batch._replace(boxes=None), cross_entropy(0.0))
    with pytest.raises(TrainingError, match="--mix cutmix cannot be used with PartRCNN, which needs boxes of parts"):
        TeacherObjective(
            TrainingConfig(image_size=_SIDE, schedule=Schedule(epochs=1), augmentation=Augmentation(mix="cutmix")),
            _network(),
            3,
        )


@pytest.mark.slow
def test_finds_the_parts_of_birds_and_beats_plain(tmp_path: Path) -> None:
    config = TrainingConfig(image_size=96, schedule=Schedule(epochs=10, batch_size=16, val_every=10))
    options = {"parts": "object,head,wing,mark", "region_size": 0.67}
    found = experiment(tmp_path, config, method="partrcnn", options=options, per_class=40, size=96, far=False)
    plain = experiment(tmp_path, config, method="plain", per_class=40, size=96, far=False)
    assert found.test > plain.test
    assert found.pcp["object"] > 0.8
    assert min(found.pcp.values()) > 0.5
