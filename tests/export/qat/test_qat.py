"""Quantisation-aware training as a stage."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from msgspec.structs import replace
from onnx import numpy_helper

from edgefg.artifact.manifest import read_manifest
from edgefg.artifact.stages import QATStage
from edgefg.data import ImageDataset, load_dataset
from edgefg.data.calibration import choose_balanced, read_calibration
from edgefg.errors import CheckpointError, DataError, ExportError
from edgefg.export.distill.objective import DistillationObjective
from edgefg.export.export import export_checkpoint
from edgefg.export.onnx.rules import broken_rules
from edgefg.export.qat import qat as stage
from edgefg.export.qat.qat import qat
from edgefg.export.qat.quantized_network import load_quantized
from edgefg.export.tracing.onnx_exporter import torch_logits, write_onnx
from edgefg.image_io import read_image
from edgefg.preprocess import UInt8Array, prepare
from edgefg.settings.options import with_options
from edgefg.settings.quantization import QuantizationConfig
from edgefg.training.checkpoint import Quantized, load, read_header
from tests.export.qat.conftest import CONFIG, HERE, SPEC, Run, quantised, quantize, write_student
from tests.export.quantizing import quantize_tensorrt
from tests.synthetic import write_dataset


def test_the_tensorrt_graph_keeps_every_rule_and_is_symmetric_int8(trt_onnx: Path, trt: Path) -> None:
    model = onnx.load(trt_onnx)
    assert broken_rules(model) == []
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    pairs = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    writer = {name: node for node in model.graph.node for name in node.output}
    assert len(pairs) > 20
    for node in pairs:
        scale, zero = (constants[name] for name in node.input[1:])
        assert zero.dtype == np.int8
        assert not zero.any()
        assert (scale > 0).all()
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            data, weights = (writer[name] for name in node.input[:2])
            assert constants[data.input[1]].size == 1
            assert constants[weights.input[1]].shape == (constants[writer[weights.input[0]].input[0]].shape[0],)
            assert constants[node.input[2]].dtype == np.float16
    header = read_header(trt)
    assert header.quantized == Quantized(to="tensorrt-onnx", torch=str(torch.__version__))
    stage = header.stages[-1]
    assert isinstance(stage, QATStage)
    assert stage.target == "tensorrt-onnx"
    assert header.validation is not None


def test_rounds_where_the_quantiser_does_and_in_its_ranges(
    student: Path, trt_onnx: Path, trt: Path, data: ImageDataset, tmp_path: Path
) -> None:
    """One epoch changes weights, never the graph: node by node it is what calibration alone gives."""
    network, _ = load(student)
    write_onnx(network, SPEC, tmp_path / "float.onnx")
    calibration = read_calibration(choose_balanced(data.splits["train"], 16, CONFIG.schedule.seed), SPEC).inputs
    quantize_tensorrt(tmp_path / "float.onnx", tmp_path / "int8.onnx", calibration)
    after, before = onnx.load(trt_onnx), onnx.load(tmp_path / "int8.onnx")
    assert Counter(node.op_type for node in after.graph.node) == Counter(node.op_type for node in before.graph.node)
    for found, expected in zip(_inputs_of_layers(after), _inputs_of_layers(before), strict=True):
        assert found[0] == expected[0]
        assert found[1] == pytest.approx(expected[1], rel=2e-3), "FP16 rounds scales up"
    quantized, _ = load_quantized(trt)
    pairs = zip(quantized.parameters(), quantised(network, calibration).parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs), "nothing was learned"


def _inputs_of_layers(model: onnx.ModelProto) -> list[tuple[str, list[float]]]:
    """Return operator and scales of the rounded data of every layer and residual sum, in the order of the graph."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    writer = {name: node for node in model.graph.node for name in node.output}
    found = []
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm", "Add"):
            sources = [writer[name] for name in node.input[: 2 if node.op_type == "Add" else 1] if name in writer]
            scales = [float(constants[it.input[1]]) for it in sources if it.op_type == "DequantizeLinear"]
            found.append((node.op_type, scales))
    return sorted(found)


@pytest.mark.slow
def test_onnxruntime_gets_a_graph_too(student: Path, birds: Path, data: ImageDataset, tmp_path: Path) -> None:
    path = quantize(student, birds, tmp_path / "qat", "onnx")
    model = onnx.load(export_checkpoint(path, tmp_path / "a", to="onnx", precision="int8", calibration=birds))
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    layers = sum(node.op_type in ("Conv", "Gemm") for node in model.graph.node)
    assert sum(values.dtype == np.int8 and values.ndim > 1 for values in constants.values()) == layers > 5
    gated = write_student(tmp_path / "gated.safetensors", data, "test_efficientnet")
    with pytest.raises(ExportError, match="lies inside an operator of this network, where training cannot round"):
        quantize(gated, birds, tmp_path / "gated", "onnx")


@pytest.mark.slow
def test_training_recovers_what_rounding_lost(
    student: Path, birds: Path, inputs: UInt8Array, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of five levels hurt; 40 steps on the network's own FP32 predictions make up for most of it (0.50 → 0.06).

    The teacher says nothing of what all logits have in common, so that is left out.
    """
    monkeypatch.setattr("edgefg.export.qat.quantized_network._LIMIT", 2)
    network, _ = load(student)
    expected = _centred(torch_logits(network, inputs))
    before = np.abs(_centred(torch_logits(quantised(network, inputs).eval(), inputs)) - expected)
    config = with_options(CONFIG, epochs=20, lr=3e-4, val_every=20)
    quantized, _ = load_quantized(quantize(student, birds, tmp_path, "tensorrt-onnx", config))
    after = np.abs(_centred(torch_logits(quantized, inputs)) - expected)
    assert before.mean() > 0.2 * np.abs(expected).max(), "nothing was lost"
    assert after.mean() < 0.4 * before.mean()


def _centred(logits: np.ndarray) -> np.ndarray:
    return logits - logits.mean(axis=1, keepdims=True)


def test_a_killed_run_goes_on_where_it_was(student: Path, birds: Path, tmp_path: Path) -> None:
    class Killed(DistillationObjective):
        def forward(self, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
            stops[0] -= 1
            if stops[0] < 0:
                raise KeyboardInterrupt
            return super().forward(*args)

    config = with_options(CONFIG, epochs=2)
    stops = [1000]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "DistillationObjective", Killed)
        whole = quantize(student, birds, tmp_path / "whole", "tensorrt-onnx", config, teacher_path=student)
        steps = (1000 - stops[0]) // 2
        stops = [steps + 1]
        with pytest.raises(KeyboardInterrupt):
            quantize(student, birds, tmp_path / "cut", "tensorrt-onnx", config, teacher_path=student)
        stops = [steps]
        resumed = quantize(student, birds, tmp_path / "cut", "tensorrt-onnx", config, teacher_path=student)
    assert stops == [0]
    assert read_header(whole) == read_header(resumed)
    assert whole.read_bytes() == resumed.read_bytes()


@pytest.mark.slow
def test_the_gate_compares_with_the_fp32_network_where_that_is_given(
    trt: Path, student: Path, birds: Path, data: ImageDataset, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"to": "tensorrt-onnx", "precision": "int8", "calibration": data}
    path = export_checkpoint(trt, tmp_path / "a", reference=student, **options)
    comparison = read_manifest(path).comparison
    assert comparison is not None
    frames = np.stack([prepare(read_image(sample.path), SPEC) for sample in data.splits["val"]])
    fp32, int8 = torch_logits(load(student)[0], frames), torch_logits(load_quantized(trt)[0], frames)
    top = float(np.abs(fp32).max())
    assert comparison.parent_logits_max == pytest.approx(top, rel=1e-5)
    assert comparison.parent_logits_max != pytest.approx(float(np.abs(int8).max()), rel=1e-5)
    other = write_student(tmp_path / "other.safetensors", data, backbone="test_efficientnet")
    for checkpoint, reference in ((trt, other), (student, student)):
        with pytest.raises(DataError, match="is not the checkpoint that this one was quantised from"):
            export_checkpoint(checkpoint, tmp_path / "b", reference=reference, **options)


def test_what_cannot_be_is_refused(trt: Path, student: Path, birds: Path, data: ImageDataset, tmp_path: Path) -> None:
    for to, precision in (("openvino", "int8"), ("tensorrt-onnx", "fp32")):
        with pytest.raises(ExportError, match=r"was trained for --to tensorrt-onnx --precision int8, not for"):
            export_checkpoint(trt, tmp_path / "a", to=to, precision=precision, calibration=birds)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="is a quantised network, whose results are those of its INT8 graph"):
        load(trt)
    with pytest.raises(DataError, match=r"is the checkpoint of a student\. Give one that `edgefg qat` wrote"):
        load_quantized(student)
    with pytest.raises(ExportError, match="--reduce-range is for CPUs only"):
        quantize(student, birds, tmp_path, "tensorrt-onnx", reduce_range=True)
    glancing = write_student(tmp_path / "wsdan.safetensors", data, method="wsdan")
    with pytest.raises(ExportError, match="is a wsdan teacher, which looks at an image several times"):
        quantize(glancing, birds, tmp_path, "tensorrt-onnx")
    others = load_dataset(write_dataset(tmp_path / "others", classes=3, per_class=20, size=40, seed=3))
    stranger = write_student(tmp_path / "stranger.safetensors", others)
    with pytest.raises(DataError, match=r"have different classes\. Give the student's own teacher"):
        quantize(student, birds, tmp_path, "tensorrt-onnx", teacher_path=stranger)


def test_the_command_line(run: Run, student: Path, birds: Path, tmp_path: Path) -> None:
    arguments: list[object] = [
        *("qat", student, birds, "--to", "tensorrt-onnx", "--out", tmp_path, "--teacher", student, "--num-samples", 16),
        *("--epochs", 1, "--batch-size", 16, "--workers", 0, "--accelerator", "cpu"),
    ]
    status, out, err = run(*arguments)
    assert (status, out.splitlines()[-1]) == (0, str(tmp_path / "qat.safetensors"))
    assert "quantising for TensorRT" in err
    status, out, err = run(*arguments)
    assert (status, "exists, made from the same data" in err, "quantising for" in err) == (0, True, False)
    arguments[arguments.index("--epochs") + 1] = 2
    status, out, err = run(*arguments)
    assert (status, len(err.strip().splitlines()[-1:])) == (2, 1)
    assert "was made with epochs 1, now 2" in err


@pytest.mark.slow
def test_the_exported_graph_has_the_ranges_of_the_calibrator_asked_for(
    run: Run, student: Path, birds: Path, data: ImageDataset, tmp_path: Path
) -> None:
    arguments = [
        *("qat", student, birds, "--to", "tensorrt-onnx", "--out", tmp_path, "--num-samples", 16),
        *("--epochs", 1, "--batch-size", 16, "--workers", 0, "--accelerator", "cpu", "--calibrator"),
    ]
    assert run(*arguments, "mse")[0] == 0
    trained = tmp_path / "qat.safetensors"
    stage = read_header(trained).stages[-1]
    assert isinstance(stage, QATStage)
    assert (stage.quantization.num_samples, stage.quantization.calibrator) == (16, "mse")
    path = export_checkpoint(trained, tmp_path / "a", to="tensorrt-onnx", precision="int8", calibration=birds)
    write_onnx(load(student)[0], SPEC, tmp_path / "float.onnx")
    calibration = read_calibration(choose_balanced(data.splits["train"], 16, CONFIG.schedule.seed), SPEC).inputs
    scales = {}
    for calibrator in ("mse", "minmax"):
        quantize_tensorrt(tmp_path / "float.onnx", tmp_path / "int8.onnx", calibration, calibrator=calibrator)
        scales[calibrator] = _scales(onnx.load(tmp_path / "int8.onnx"))
    found = _scales(onnx.load(path))
    assert found == pytest.approx(scales["mse"], rel=2e-3)
    assert found != pytest.approx(scales["minmax"], rel=2e-3)
    status, _, err = run(*arguments, "minmax")
    assert (status, "was made with calibrator mse, now minmax" in err) == (2, True)


def _scales(model: onnx.ModelProto) -> list[float]:
    return [scale for _, scales in _inputs_of_layers(model) for scale in scales]


def test_calibration_goes_by_condition_too(data: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conditions = {path: "night" for path, _ in data.splits["train"][::3]}
    given: list[object] = []

    def choose(*arguments: Any) -> list[Path]:
        given.extend(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, "choose_balanced", choose)
    given_data = replace(data, conditions=conditions)
    student = write_student(tmp_path / "student.safetensors", data)
    config = QuantizationConfig(num_samples=8)
    with pytest.raises(KeyboardInterrupt):
        qat(student, given_data, tmp_path / "out", CONFIG, to="openvino", quantization=config, hardware=HERE)
    assert given[1:] == [8, CONFIG.schedule.seed, conditions]
