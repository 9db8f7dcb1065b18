"""Bias correction: a quantised layer's mean output is what it is in FP32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgefg.errors import ExportError
from edgefg.export.onnx.check import check
from edgefg.export.onnx.graph import Graph
from edgefg.export.onnx.session import open_session
from edgefg.export.quantize.bias_correction import correct_biases
from edgefg.export.tracing.onnx_exporter import write_onnx
from edgefg.preprocess import InputSpec, UInt8Array
from edgefg.training.models.network import Network
from tests.export.quantizing import quantize_onnxruntime, quantize_tensorrt


@pytest.fixture(scope="module")
def fp32(resnet: tuple[Network, InputSpec], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fp32") / "model.onnx"
    write_onnx(*resnet, path)
    return path


@pytest.fixture(scope="module")
def inputs() -> UInt8Array:
    return np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), np.uint8)


def _layer_means(path: Path, inputs: UInt8Array) -> dict[str, npt.NDArray[np.float64]]:
    """Mean output of every channel of every layer, from whole activations."""
    model = onnx.load(path)
    layers = {node.name: node for node in model.graph.node if node.op_type in ("Conv", "Gemm")}
    outputs = {value.name for value in model.graph.output}
    kind = TensorProto.FLOAT16 if any(t.data_type == TensorProto.FLOAT16 for t in model.graph.initializer) else 1
    for node in layers.values():
        if node.output[0] not in outputs:
            model.graph.output.append(helper.make_tensor_value_info(node.output[0], kind, None))
    session = open_session(model.SerializeToString())
    names = [node.output[0] for node in layers.values()]
    rows = [session.run(names, {"images": row[None]}) for row in inputs]
    means = [np.mean([row[i] for row in rows], axis=0, dtype=np.float64) for i in range(len(names))]
    return {name: m[0].mean((1, 2)) if m.ndim == 4 else m[0] for name, m in zip(layers, means, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "tensorrt"])
def test_every_layer_keeps_its_mean(fp32: Path, inputs: UInt8Array, target: str, tmp_path: Path) -> None:
    quantise = quantize_onnxruntime if target == "onnx" else quantize_tensorrt
    expected = _layer_means(fp32, inputs)
    shifts = {}
    for corrected in (False, True):
        quantise(fp32, tmp_path / "m.onnx", inputs, bias_correction=corrected)
        found = _layer_means(tmp_path / "m.onnx", inputs)
        assert found.keys() == expected.keys()
        shifts[corrected] = np.array([np.abs(found[name] - expected[name]).mean() for name in expected])
    assert len(expected) > 10
    assert shifts[True].sum() < 0.5 * shifts[False].sum()
    if target == "tensorrt":
        assert check(tmp_path / "m.onnx").broken == ()


def _graph(bias: bool) -> onnx.ModelProto:
    """Two convolutions, which share a bias or have none, and the mean over all places."""
    random = np.random.default_rng(1)
    names = ["bias"] if bias else []
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["planes"], "transpose", perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["planes", "a", *names], ["middle"], "first"),
        helper.make_node("Conv", ["middle", "b", *names], ["features"], "second"),
        helper.make_node("ReduceMean", ["features", "axes"], ["logits"], "mean", keepdims=0),
    ]
    arrays = {"a": random.normal(size=(3, 3, 1, 1)), "b": random.normal(size=(3, 3, 1, 1)), "bias": np.ones(3)}
    constants = [numpy_helper.from_array(values.astype(np.float32), name) for name, values in arrays.items()]
    constants.append(numpy_helper.from_array(np.array([2, 3]), "axes"))
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, [1, 8, 8, 3])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 3])
    graph = helper.make_graph(nodes, "g", [images], [logits], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def _rounded(model: onnx.ModelProto) -> onnx.ModelProto:
    """Stand in for a quantiser: weights rounded to halves."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.name in ("a", "b"):
            tensor.CopyFrom(numpy_helper.from_array(np.rint(numpy_helper.to_array(tensor) * 2) / 2, tensor.name))
    return copy


@pytest.mark.parametrize("bias", [True, False])
def test_the_formula(bias: bool) -> None:
    """New bias = bias − E[quantised output − FP32 output], the second layer's after the first one's (Nagel, eq. 14)."""
    inputs = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    model = _graph(bias)
    before = model.SerializeToString()
    corrected = Graph(correct_biases(model, _rounded, [row[None] for row in inputs]))
    assert model.SerializeToString() == before
    x = inputs.reshape(-1, 3).astype(np.float64)
    a, b = (corrected.array(name)[:, :, 0, 0].astype(np.float64) for name in ("a", "b"))
    old = np.ones(3) if bias else np.zeros(3)
    middle = x @ a.T + old
    rough = x @ (np.rint(a * 2) / 2).T + old
    first = old - (rough - middle).mean(0)
    rough = rough - old + first
    second = old - ((rough @ (np.rint(b * 2) / 2).T) - (middle @ b.T)).mean(0)
    found = {node.name: corrected.array(node.input[2]) for node in corrected.nodes if node.op_type == "Conv"}
    np.testing.assert_allclose(found["first"], first, rtol=1e-3)
    np.testing.assert_allclose(found["second"], second, rtol=1e-3, atol=0.05)


def test_a_graph_that_cannot_run_is_one_line() -> None:
    broken = _graph(True)
    broken.graph.node[0].op_type = "Absent"
    with pytest.raises(ExportError, match="the biases could not be corrected") as caught:
        correct_biases(broken, _rounded, [np.zeros((1, 8, 8, 3), np.uint8)])
    assert "\n" not in str(caught.value)
