"""Every method that is one feed-forward graph exports by itself, and its engine computes what it computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgefg import Classifier, __version__
from edgefg.artifact.stages import StartingWeights, TrainStage
from edgefg.data import ImageDataset
from edgefg.export.export import export_checkpoint
from edgefg.export.targets.openvino import convert
from edgefg.export.tracing.onnx_exporter import PARITY, check_parity, torch_logits, write_onnx
from edgefg.image_io import read_image
from edgefg.preprocess import InputSpec, UInt8Array, prepare
from edgefg.settings.split import SplitSpec
from edgefg.settings.training import TrainingConfig
from edgefg.training.checkpoint import SCHEMA, Header, save
from edgefg.training.methods import build
from edgefg.training.models.backbone import build_backbone
from edgefg.training.models.network import Network
from tests.export.openvino_cpu import compile_for_cpu

GRAY = (127.0,) * 3
SIDE = 64
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "se": ("se", "resnet10t", {}),
    "cbam": ("cbam", "resnet10t", {}),
    "bcnn": ("bcnn", "resnet10t", {"projection": 16}),
    "bcnn two streams": ("bcnn", "resnet10t", {"projection": 16, "streams": 2}),
    "bcnn compact": ("bcnn", "resnet10t", {"pooling": "compact", "dimensions": 256}),
    "se MBConv": ("se", "tf_efficientnet_lite0", {}),
    "cbam MBConv": ("cbam", "tf_efficientnet_lite0", {}),
    "cbam stages": ("cbam", "torchvision:alexnet", {}),
    "bcnn VGG": ("bcnn", "vgg11", {}),
    "AlexNet": ("plain", "torchvision:alexnet", {}),
    "VGG-16": ("plain", "torchvision:vgg16", {}),
    "ResNet-50": ("plain", "resnet50", {}),
}
QUICK = ("bcnn two streams",)


def network_of(name: str) -> Network:
    method, backbone, options = CASES[name]
    torch.manual_seed(0)
    network = build(method, build_backbone(backbone, 4), GRAY, GRAY, options).eval()
    for module in network.backbone.modules():
        if isinstance(module, nn.BatchNorm2d):  # timm starts the last one of a branch at 0, which would hide the gate
            nn.init.uniform_(module.weight, 0.5, 1.0)
    for gate in getattr(network, "gates", ()):
        for tensor in gate.parameters():  # trained gates are not constant
            nn.init.normal_(tensor, std=0.5)
    return network


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_onnx_and_openvino_compute_what_torch_computes(name: str, unseen: UInt8Array, tmp_path: Path) -> None:
    network, inputs = network_of(name), unseen[:4]
    path = tmp_path / "model.onnx"
    write_onnx(network, InputSpec(height=SIDE, width=SIDE), path, batch=1)
    check_parity(network, path, inputs)
    engine = compile_for_cpu(convert(path))
    expected = torch_logits(network, inputs)
    # The pictures must differ for the network, or equal logits would prove nothing.
    assert np.ptp(expected, axis=0).max() > 1e-3 * np.abs(expected).max()
    found = np.concatenate([engine(image[np.newaxis])[0] for image in inputs])
    assert np.abs(found - expected).max() <= PARITY * np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["se", "cbam", "bcnn", "bcnn two streams", "bcnn compact"])
def test_a_checkpoint_becomes_an_artifact(name: str, data: ImageDataset, tmp_path: Path) -> None:
    method, backbone, options = CASES[name]
    network = network_of(name)
    weights = StartingWeights(source="none")
    trained = TrainStage(method=method, backbone=backbone, weights=weights, training=TrainingConfig())
    header = Header(
        schema=SCHEMA, kind="teacher", method=method, options=options, backbone=backbone, labels=data.labels,
        input=InputSpec(height=SIDE, width=SIDE), mean=GRAY, std=GRAY, dataset=data.fingerprint, split=SplitSpec(),
        stages=(trained,),
        edgefg=__version__,
    )  # fmt: skip
    save(tmp_path / "teacher.safetensors", network, header)
    model = export_checkpoint(
        tmp_path / "teacher.safetensors", tmp_path / "artifact", to="openvino", precision="fp32", calibration=data.root
    )
    frame = read_image(data.splits["val"][0].path)
    expected = torch_logits(network, prepare(frame, InputSpec(height=SIDE, width=SIDE))[np.newaxis])[0]
    with Classifier(model) as classifier:
        prediction = classifier.predict(frame)
        stage = classifier.manifest.provenance.stages[0]
    assert (stage["kind"], stage["backbone"], stage["method"]) == ("train", backbone, method)
    assert prediction.label in data.labels
    assert np.abs(prediction.logits - expected).max() <= PARITY * np.abs(expected).max()


@pytest.mark.parametrize("batch", [0, 3])
@pytest.mark.slow
def test_batches(batch: int, unseen: UInt8Array, tmp_path: Path) -> None:
    network = network_of("bcnn two streams")
    write_onnx(network, InputSpec(height=SIDE, width=SIDE), tmp_path / "model.onnx", batch=batch)
    check_parity(network, tmp_path / "model.onnx", unseen[:3])
