"""`edgefg export` and `sensitivity`: the arguments that reach the library; `edgefg check` on good and bad graphs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnxruntime.quantization import quantize_dynamic

from edgefg.export.onnx.rules import FULL_PRECISION, RULES
from edgefg.quiet import quiet
from edgefg.settings.export import ExportConfig
from edgefg.settings.gate import Gate
from edgefg.settings.quantization import QuantizationConfig
from tests.conftest import TINY, Run
from tests.export.quantizing import quantize_tensorrt


def test_export_hands_over_groups_of_settings(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr("edgefg.export.export.export_checkpoint", lambda *args, **options: seen.update(options))
    line = "export c --to openvino --out o --precision int8 --num-samples 24 --no-reduce-range --keep-layers a"
    line += " --keep-layers b --no-fit-temperature --batch 0 --max-drop -5"
    status, _, err = run(*line.split())
    assert (status, err) == (0, "")
    assert seen["quantization"] == QuantizationConfig(num_samples=24, reduce_range=False, keep_layers=("a", "b"))
    assert seen["config"] == ExportConfig(batch=0, fit_temperature=False)
    assert seen["gate"] == Gate(max_drop=-5)
    assert (seen["to"], seen["precision"]) == ("openvino", "int8")
    assert run(*line.split(), "--no-gate")[0] == 0
    assert seen["gate"] is None


def test_sensitivity_needs_few_images(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Found:
        def render(self) -> str:
            return "a table"

    def sensitivity(*args: Any, **options: Any) -> Found:
        seen.extend((args, options))
        return Found()

    monkeypatch.setattr("edgefg.export.quantize.layer_sensitivity.sensitivity", sensitivity)
    assert run("sensitivity", "c", "d", "--to", "onnx", "--reduce-range") == (0, "a table\n", "")
    (*_, target), options = seen
    assert target.name == "onnx"
    assert options["quantization"] == QuantizationConfig(num_samples=32, reduce_range=True)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("check") / "model.onnx"
    inputs = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
    quantize_tensorrt(TINY / "onnx" / "model.onnx", path, inputs)
    return path


@pytest.fixture
def spoilt(quantized: Path, tmp_path: Path) -> Path:
    """Two activations with three scales each: Q and DQ of each break the rule."""
    model = onnx.load(quantized)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    pairs = [n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] not in constants]
    for node in pairs[:2]:
        scales = np.full(3, 0.1, np.float16)
        constants[node.input[1]].CopyFrom(numpy_helper.from_array(scales, node.input[1]))
    onnx.save(model, tmp_path / "spoilt.onnx")
    return tmp_path / "spoilt.onnx"


def test_all_rules_hold(run: Run, quantized: Path) -> None:
    nodes = len(onnx.load(quantized).graph.node)
    status, out, err = run("check", quantized, "--for", "tensorrt")
    assert (status, err, out.count("\n")) == (0, "", 1)
    assert f"{nodes} nodes" in out
    assert out.endswith(f"{len(RULES)} rules: all hold\n")


def test_one_line_a_violation(run: Run, spoilt: Path) -> None:
    status, out, err = run("check", spoilt, "--for", "tensorrt")
    head, *lines = out.splitlines()
    assert (status, err, len(lines)) == (1, "", 4)
    assert head.endswith("broken in 4 places, for 4 of which TensorRT refuses the graph")
    said = "per-tensor: 3 scales on an activation; expected one scale for an activation: quantise only constants"
    assert all(said in line for line in lines)


def test_json(run: Run, quantized: Path, spoilt: Path) -> None:
    status, out, _ = run("check", quantized, "--json")
    assert (status, json.loads(out)["broken"]) == (0, [])
    status, out, _ = run("check", spoilt, "--json")
    answer = json.loads(out)
    assert (status, answer["rules"]) == (1, len(RULES))
    assert {violation["rule"] for violation in answer["broken"]} == {"per-tensor"}
    assert all(violation["refused"] and violation["node"] for violation in answer["broken"])


def test_a_reason_for_fp32_is_told(run: Run, quantized: Path, tmp_path: Path) -> None:
    model = onnx.load(quantized)
    model.metadata_props.add(key=FULL_PRECISION, value="activations reach 70000")
    onnx.save(model, tmp_path / "m.onnx")
    status, out, _ = run("check", tmp_path / "m.onnx")
    assert (status, out.count("\n")) == (0, 1)
    assert out.endswith("rules: all hold; floating point is FP32: activations reach 70000\n")
    status, out, _ = run("check", tmp_path / "m.onnx", "--json")
    assert (status, json.loads(out)["float32"]) == (0, "activations reach 70000")


def test_a_dynamically_quantised_graph_is_refused(run: Run, tmp_path: Path) -> None:
    with quiet():
        quantize_dynamic(TINY / "onnx" / "model.onnx", tmp_path / "m.onnx")
    status, out, _ = run("check", tmp_path / "m.onnx")
    assert (status, out.count("\n")) == (1, 2)
    assert "for 1 of which TensorRT refuses the graph" in out
    assert "explicit-qdq: 10 nodes that compute in integers: ConvInteger, DynamicQuantizeLinear, MatMulInteger" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["missing.onnx"], "missing.onnx is not a readable ONNX file"),
        ([TINY / "onnx" / "model.json"], "is not a readable ONNX file"),
    ],
)
def test_bad_usage(run: Run, words: list[object], said: str) -> None:
    status, _, err = run("check", *words)
    assert (status, err.count("\n")) == (2, 1)
    assert said in err


def test_onnx_is_not_installed(run: Run, quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "edgefg.export.onnx.check")
    monkeypatch.setitem(sys.modules, "onnx", None)
    status, _, err = run("check", quantized)
    assert (status, err.count("\n")) == (2, 1)
    assert "pip install" in err
