from __future__ import annotations

import msgspec
import pytest

from edgefg.artifact.stages import (
    DistillStage,
    ExportStage,
    PruneStage,
    RelativeCost,
    StageRecord,
    StartingWeights,
    TrainStage,
    UnlabelledImages,
    decode_stages,
    encode_stages,
    render_stages,
    versions_of,
)
from edgefg.errors import ManifestError
from edgefg.settings.distillation import DistillationConfig
from edgefg.settings.export import ExportConfig
from edgefg.settings.pruning import PruningConfig
from edgefg.settings.quantization import QuantizationConfig
from edgefg.settings.training import Schedule, TrainingConfig

CONFIG = TrainingConfig(image_size=64, schedule=Schedule(epochs=3, lr=0.01))
TRAIN = TrainStage(
    method="wsdan",
    options={"maps": 4, "beta": 0.05},
    backbone="resnet18",
    weights=StartingWeights(source="a.pth", sha256="a" * 64),
    training=CONFIG,
    versions={"torch": "2.9"},
)
DISTILL = DistillStage(
    backbone="resnet18",
    weights=StartingWeights(source="hub"),
    training=CONFIG,
    distillation=DistillationConfig(loss="dist"),
    unlabelled=UnlabelledImages(count=7, fingerprint="f"),
    parents=("b" * 64, "c" * 64),
)
PRUNE = PruneStage(
    pruning=PruningConfig(macs=0.5), training=CONFIG, remaining=RelativeCost(macs=0.49, params=0.6), versions={"x": "1"}
)
EXPORT = ExportStage(
    target="onnx", precision="int8", config=ExportConfig(batch=4), quantization=QuantizationConfig(keep_layers=("a",))
)
ALL: tuple[StageRecord, ...] = (TRAIN, DISTILL, PRUNE, EXPORT)


def test_records_survive_a_manifest() -> None:
    encoded = encode_stages(ALL)
    assert [stage["kind"] for stage in encoded] == ["train", "distill", "prune", "export"]
    assert decode_stages(encoded) == ALL
    assert encode_stages(decode_stages(encoded)) == encoded


def test_records_survive_settings_that_came_or_went() -> None:
    encoded = msgspec.json.decode(msgspec.json.encode(TRAIN))
    del encoded["training"]["metric_learning"]
    encoded["training"]["schedule"]["of_a_later_version"] = 1
    assert decode_stages([encoded]) == (TRAIN,)


def test_a_kind_of_a_later_version_is_named() -> None:
    with pytest.raises(ManifestError, match=r"cannot read the record of the stages \(.*'merge'.*\)\. Upgrade edgefg"):
        decode_stages([{"kind": "merge"}])


def test_identity_leaves_versions_and_results_out() -> None:
    assert TRAIN.identity() == msgspec.structs.replace(TRAIN, versions={})
    assert PRUNE.identity() == msgspec.structs.replace(PRUNE, versions={}, remaining=None)
    assert TRAIN.identity() != msgspec.structs.replace(TRAIN, training=TrainingConfig()).identity()


def test_records_are_rendered_with_the_settings_that_are_not_defaults() -> None:
    train, distill, prune, export = render_stages(ALL).splitlines()
    assert train == (
        "1. train: method wsdan, maps 4, beta 0.05, backbone resnet18, weights a.pth (aaaaaaaaaaaa), --image-size 64,"
        " --epochs 3, --lr 0.01, torch 2.9"
    )
    assert distill.endswith("--loss dist, 7 unlabelled images, parent bbbbbbbbbbbb, parent cccccccccccc")
    assert "--macs 0.5" in prune
    assert "remaining 0.490 of the MACs, 0.600 of the parameters" in prune
    assert export == "4. export: target onnx, precision int8, --batch 4, --keep-layers ('a',)"


def test_costs_that_were_not_measured_cannot_be_compared() -> None:
    cost = RelativeCost(macs=0.5, params=0.6)
    assert cost.of("params") == 0.6
    with pytest.raises(ValueError, match="latency was not measured"):
        cost.of("latency")
    assert RelativeCost(macs=0.5, params=0.6, latency=0.7).render().endswith(", 0.700 of the latency")


def test_versions_are_those_of_installed_packages() -> None:
    assert list(versions_of("msgspec")) == ["edgefg", "msgspec"]
    assert versions_of("msgspec")["msgspec"] == msgspec.__version__
