"""An export is compared with its checkpoint before it gets its name, and its confidences mean what they say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edgefg import Classifier
from edgefg.artifact.manifest import read_manifest
from edgefg.data import ImageDataset
from edgefg.errors import GateError
from edgefg.export.export import export_checkpoint
from edgefg.export.targets.onnxruntime import ONNXRuntimeQuantizer
from edgefg.export.tensorrt.build import build_engine
from edgefg.export.tracing.onnx_exporter import torch_logits
from edgefg.image_io import read_image
from edgefg.metrics import expected_calibration_error, negative_log_likelihood, softmax
from edgefg.preprocess import prepare
from edgefg.settings.gate import Gate
from edgefg.settings.quantization import QuantizationConfig
from edgefg.training.checkpoint import load
from tests.conftest import Run
from tests.simulated.books import Books


def export_int8(checkpoint: Path, out: Path, data: Path) -> Path:
    few = QuantizationConfig(num_samples=4)
    return export_checkpoint(checkpoint, out, to="onnx", precision="int8", calibration=data, quantization=few)


def change_head(graph: Path, folder: Path, scale: float, shift: tuple[float, ...]) -> Path:
    """Write a copy of the network whose logits are multiplied, and shifted class by class."""
    proto = onnx.load(graph)
    (gemm,) = (node for node in proto.graph.node if node.op_type == "Gemm")
    for tensor in proto.graph.initializer:
        if tensor.name in gemm.input[1:]:
            values = np.float32(scale) * numpy_helper.to_array(tensor)
            if tensor.name == gemm.input[2]:
                values += np.array(shift, np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(proto, folder / "model.onnx")
    return folder / "model.onnx"


def quantize_as(monkeypatch: pytest.MonkeyPatch, scale: float, shift: tuple[float, ...]) -> None:
    """Let quantisation for ONNX Runtime do this to the head, and nothing else."""
    monkeypatch.setattr(
        ONNXRuntimeQuantizer, "_write", lambda self, folder, *_, **__: change_head(self.source, folder, scale, shift)
    )


@pytest.fixture
def spoilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """INT8 never says ``disc``."""
    quantize_as(monkeypatch, 1, (0, 0, -50, 0))


@pytest.fixture
def loud(lite0: Path, birds_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An INT8 artifact whose logits are six times those of its parent: as often right, and far too sure."""
    quantize_as(monkeypatch, 6, (0, 0, 0, 0))
    return export_int8(lite0, tmp_path / "loud", birds_folder)


def logits_on_val(model: Path, data: ImageDataset) -> tuple[np.ndarray, np.ndarray]:
    with Classifier(model) as classifier:
        rows = classifier.predict_batch([read_image(sample.path) for sample in data.splits["val"]])
    return np.stack([row.logits for row in rows]), np.array([sample.label for sample in data.splits["val"]])


def test_what_passed_is_in_the_manifest(int8: Path, lite0: Path, data: ImageDataset) -> None:
    network, header = load(lite0)
    before = torch_logits(network, np.stack([prepare(read_image(s.path), header.input) for s in data.splits["val"]]))
    after, labels = logits_on_val(int8, data)
    found = read_manifest(int8).comparison
    assert found is not None
    assert found.gate == Gate()
    assert (found.parent.images, found.parent.top1) == (len(labels), (before.argmax(1) == labels).mean())
    drop = 100 * ((before.argmax(1) == labels).mean() - (after.argmax(1) == labels).mean())
    assert found.drop == pytest.approx(drop)
    assert found.logits == pytest.approx(np.abs(after - before).max(), rel=1e-3)
    assert found.agreement == (before.argmax(1) == after.argmax(1)).mean()


def test_fp32_loses_nothing(fp32: Path) -> None:
    found = read_manifest(fp32).comparison
    assert found is not None
    assert (found.lost, found.gained, found.agreement, found.mcnemar_p, found.worst) == (0, 0, 1, 1, ())
    assert found.logits <= 1e-4 * found.parent_logits_max


def test_a_failed_gate_leaves_no_artifact_and_names_the_class(
    spoilt: None, lite0: Path, birds_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(GateError, match=r"the artifact does not pass the gate: .*disc: recall .* → 0\.0%"):
        export_int8(lite0, tmp_path / "a", birds_folder)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_gate_leaves_the_earlier_artifact(
    spoilt: None, lite0: Path, fp32: Path, birds_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(fp32.parent, tmp_path / "a")
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    with pytest.raises(GateError):
        export_int8(lite0, tmp_path / "a", birds_folder)
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_without_a_gate_the_loss_is_recorded(
    spoilt: None, lite0: Path, birds_folder: Path, tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "a"
    status, _, _ = run(
        *("export", lite0, "--to", "onnx", "--precision", "int8", "--calibration", birds_folder, "--num-samples", 4),
        *("--out", out, "--no-gate", "--no-fit-temperature"),
    )
    assert status == 0
    manifest = read_manifest(out / "model.onnx")
    assert manifest.comparison is not None
    assert manifest.comparison.gate is None
    assert manifest.comparison.worst[0].label == "disc"
    assert (manifest.temperature_scaling, manifest.output.temperature) == (None, 1)


def test_the_command_s_limits_decide_and_inspect_shows_what_passed(
    spoilt: None, lite0: Path, birds_folder: Path, tmp_path: Path, run: Run
) -> None:
    command = (
        "export",
        lite0,
        "--to",
        "onnx",
        "--precision",
        "int8",
        "--calibration",
        birds_folder,
        "--num-samples",
        4,
    )
    limits = ("--max-drop", 100, "--max-class-drop", 100, "--max-flips")
    status, out, err = run(*command, "--out", tmp_path / "a", *limits, 0)
    assert (status, out) == (1, "")
    assert "flip on val of" in err.splitlines()[-1]
    assert "disc →" in err.splitlines()[-1]
    assert not (tmp_path / "a").exists()
    assert run(*command, "--out", tmp_path / "a", *limits, 100)[0] == 0
    status, out, _ = run("inspect", tmp_path / "a" / "model.onnx", "--json")
    shown = json.loads(out)
    gate = {"max_drop": 100.0, "max_class_drop": 100.0, "max_flips": 100.0, "min_agreement": 0.0}
    assert shown["comparison"]["gate"] == gate, "whole, whatever the defaults will be one day"
    assert shown["comparison"]["worst"][0]["label"] == "disc"
    assert shown["temperature_scaling"]["images"] == shown["comparison"]["parent"]["images"]
    status, out, _ = run("inspect", tmp_path / "a" / "model.onnx")
    assert "comparison: drop +" in out
    assert "disc: recall" in out
    assert "temperature" in out


@pytest.mark.parametrize("option", [("--max-class-drop", -1), ("--min-agreement", 1.5), ("--max-drop", "nan")])
def test_a_limit_out_of_range_is_refused(option: tuple[str, object], lite0: Path, tmp_path: Path, run: Run) -> None:
    status, _, err = run("export", lite0, "--to", "onnx", "--out", tmp_path / "a", *option)
    assert status == 2
    assert str(option[0]) in err


def test_the_temperature_is_fitted_on_the_artifact_s_own_logits(loud: Path, int8: Path, data: ImageDataset) -> None:
    """Not on the parent's, which is calibrated enough for its temperature to stay at 1."""
    manifest = read_manifest(loud)
    temperature, found = manifest.output.temperature, manifest.temperature_scaling
    logits, labels = logits_on_val(loud, data)
    assert found is not None
    assert temperature > 3
    assert (found.data, found.images) == (f"val of {data.root.resolve().name}", len(labels))
    assert found.ece_before == pytest.approx(expected_calibration_error(softmax(logits), labels), abs=1e-6)
    assert found.nll_after < found.nll_before == pytest.approx(negative_log_likelihood(logits, labels))
    best = negative_log_likelihood(logits, labels, temperature)
    for other in (0.9 * temperature, 1.1 * temperature):
        assert best < negative_log_likelihood(logits, labels, other)
    assert manifest.comparison is not None
    assert manifest.comparison.drop == 0, "a temperature moves no answer"
    untouched = read_manifest(int8)
    assert untouched.temperature_scaling is not None
    assert untouched.temperature_scaling.unchanged
    assert untouched.output.temperature == 1


def test_the_artifact_s_confidence_uses_the_temperature(loud: Path, data: ImageDataset) -> None:
    temperature = read_manifest(loud).output.temperature
    with Classifier(loud, verify=True) as classifier:
        for sample in data.splits["val"]:
            prediction = classifier.predict(read_image(sample.path))
            expected = softmax(prediction.logits, temperature).max()
            assert prediction.confidence == pytest.approx(expected, rel=1e-5)
            assert prediction.confidence < softmax(prediction.logits).max()


def test_a_plan_of_it_keeps_the_temperature_and_the_width_of_weights(loud: Path, device: Books) -> None:
    report = build_engine([loud])
    source, plan = read_manifest(loud), read_manifest(Path(report.plan))
    assert plan.output == source.output
    assert plan.weight_bits == source.weight_bits is not None
    assert plan.output.temperature > 3
    assert (plan.comparison, plan.temperature_scaling) == (None, None), "these are of another engine"


def test_without_validation_images_nothing_is_compared(
    lite0: Path, data: ImageDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    without = msgspec.structs.replace(data, splits={**data.splits, "val": ()})
    model = export_checkpoint(lite0, tmp_path / "a", to="onnx", precision="fp32", calibration=without)
    manifest = read_manifest(model)
    assert (manifest.accuracy, manifest.comparison, manifest.temperature_scaling) == (None, None, None)
    assert manifest.output.temperature == 1
    assert "no validation images" in caplog.text
