"""A student with untrained weights, and networks that were trained in INT8 from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from edgefg.data import ImageDataset, load_dataset
from edgefg.data.calibration import choose_balanced, read_calibration
from edgefg.export.export import export_checkpoint
from edgefg.export.qat.qat import qat, quantized_for
from edgefg.export.qat.quantized_network import QuantizedNetwork
from edgefg.export.targets import target_of
from edgefg.preprocess import InputSpec, UInt8Array
from edgefg.settings.hardware import Hardware
from edgefg.settings.quantization import QuantizationConfig, TargetName
from edgefg.settings.split import SplitSpec
from edgefg.settings.training import Schedule, TrainingConfig
from edgefg.training.checkpoint import SCHEMA, Header, save
from edgefg.training.methods import build
from edgefg.training.models.backbone import build_backbone
from edgefg.training.models.network import Network
from tests.conftest import Shared
from tests.synthetic import write_dataset

HERE = Hardware(accelerator="cpu", workers=0)
CONFIG = TrainingConfig(image_size=32, schedule=Schedule(epochs=1, batch_size=16, lr=1e-4))
SPEC = InputSpec(height=32, width=32)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="package")
def birds(shared: Shared) -> Path:
    return shared("qat-birds", lambda folder: write_dataset(folder, classes=2, per_class=20, size=40, seed=2))


@pytest.fixture(scope="package")
def data(birds: Path) -> ImageDataset:
    return load_dataset(birds)


@pytest.fixture(scope="package")
def inputs(data: ImageDataset) -> UInt8Array:
    return read_calibration(choose_balanced(data.splits["train"], 16), SPEC).inputs


def write_student(path: Path, data: ImageDataset, backbone: str = "test_resnet", method: str = "plain") -> Path:
    """Write a checkpoint with untrained weights but batch norms of some account."""
    torch.manual_seed(0)
    network = build(method, build_backbone(backbone, len(data.labels)), (127.0, 120.0, 110.0), (60.0, 62.0, 64.0), {})
    network.train()
    with torch.no_grad():
        for _ in range(20):
            network.backbone(torch.randn(8, 3, 32, 32))
    header = Header(
        schema=SCHEMA, kind="student", method=method, backbone=backbone, labels=data.labels, input=SPEC,
        mean=(127.0, 120.0, 110.0), std=(60.0, 62.0, 64.0), dataset=data.fingerprint, split=SplitSpec(),
        teacher="e" * 64, edgefg="0",
    )  # fmt: skip
    save(path, network, header)
    return path


@pytest.fixture(scope="package")
def student(data: ImageDataset, shared: Shared) -> Path:
    name = "student.safetensors"
    return shared("qat-student", lambda folder: write_student(folder / name, data)) / name


def quantize(
    student: Path, birds: Path, out: Path, to: TargetName, config: TrainingConfig = CONFIG, *,
    reduce_range: bool | None = None, **options: Any,
) -> Path:  # fmt: skip
    quantization = QuantizationConfig(num_samples=16, reduce_range=reduce_range)
    return qat(student, birds, out, config, to=to, quantization=quantization, hardware=HERE, **options)


def quantised(
    network: Network, inputs: UInt8Array, to: TargetName = "tensorrt-onnx", **config: Any
) -> QuantizedNetwork:
    return quantized_for(network, SPEC, target_of(to), inputs, QuantizationConfig(**config))


@pytest.fixture(scope="package")
def trt(student: Path, birds: Path, shared: Shared) -> Path:
    """Checkpoint of a network trained for TensorRT; not to be spoilt."""
    made = shared("qat-trt", lambda folder: quantize(student, birds, folder, "tensorrt-onnx"))
    return made / "qat.safetensors"


@pytest.fixture(scope="package")
def trt_onnx(trt: Path, birds: Path, shared: Shared) -> Path:
    """Its artifact."""
    options: dict[str, Any] = {"to": "tensorrt-onnx", "precision": "int8", "calibration": birds}
    return shared("qat-trt-onnx", lambda folder: export_checkpoint(trt, folder / "a", **options)) / "a" / "model.onnx"
