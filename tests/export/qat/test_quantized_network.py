"""The quantised network: what it computes, how it is loaded, and what is exported from it."""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from msgspec.structs import replace
from onnx import TensorProto, numpy_helper

from edgefg.artifact.hashes import sha256
from edgefg.classifier import Classifier
from edgefg.data import ImageDataset
from edgefg.errors import CheckpointError, ExportError
from edgefg.export.export import export_checkpoint
from edgefg.export.prune.prune import prune
from edgefg.export.qat.quantized_network import (
    QuantizedNetwork,
    check_quantized_parity,
    check_trained_for,
    load_quantized,
)
from edgefg.export.quantize.pairs import QuantParams, with_integer_weights
from edgefg.export.tracing.onnx_exporter import to_graph, torch_logits
from edgefg.export.tracing.trainable_graph import trace
from edgefg.preprocess import UInt8Array
from edgefg.settings.export import ExportConfig
from edgefg.settings.pruning import PruningConfig
from edgefg.settings.quantization import QuantizationConfig, TargetName
from edgefg.training.checkpoint import Quantized, load, read_header, save
from tests.export.openvino_cpu import compile_for_cpu
from tests.export.qat.conftest import CONFIG, HERE, SPEC, quantised, quantize, write_student


def test_the_graph_computes_what_the_network_does(trt: Path, trt_onnx: Path, inputs: UInt8Array) -> None:
    network, _ = load_quantized(trt)
    model = to_graph(network, SPEC, batch=0)
    largest = float(np.abs(torch_logits(network, inputs)).max())
    assert check_quantized_parity(network, model, inputs, batch=0) <= 1e-3 * largest
    with Classifier(trt_onnx) as classifier:  # FP16 and 8-bit kernels included
        found = np.stack([prediction.logits for prediction in classifier.predict_batch(list(inputs), color="rgb")])
    assert np.abs(found - torch_logits(network, inputs)).max() <= 0.05 * largest
    with torch.no_grad():
        next(network.parameters()).mul_(2)
    with pytest.raises(ExportError, match=r"the QDQ graph deviates from the quantised network by \d\S+ on average"):
        check_quantized_parity(network, model, inputs, batch=0)


def test_openvino_runs_it_in_int8(student: Path, birds: Path, inputs: UInt8Array, tmp_path: Path) -> None:
    path = quantize(student, birds, tmp_path / "qat", "openvino", reduce_range=True)
    config = ExportConfig(batch=0)
    model = export_checkpoint(path, tmp_path / "a", to="openvino", precision="int8", config=config)  # without data
    network, header = load_quantized(path)
    assert header.quantized is not None
    assert header.quantized.reduce_range
    compiled = compile_for_cpu(model)
    layers = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    kinds = Counter(
        info["runtimePrecision"].astype(str)
        for info in layers
        if info["layerType"].astype(str) in ("Convolution", "FullyConnected")
    )
    assert kinds.keys() == {"u8"} or kinds.keys() == {"u8", "i8"}, f"floating point layers: {kinds}"
    constants = [node for node in openvino.Core().read_model(model).get_ops() if node.get_type_name() == "Constant"]
    weights = [node.data for node in constants if node.get_element_type() == openvino.Type.i8 and node.data.ndim > 1]
    assert len(weights) == kinds.total()
    assert max(int(np.abs(values.astype(np.int32)).max()) for values in weights) == 64
    expected = torch_logits(network, inputs)
    found = compiled([inputs])[0]
    assert np.abs(found - expected).max() <= 0.05 * np.abs(expected).max()


@pytest.mark.slow
def test_depthwise_weights_keep_8_bits_where_others_take_7(
    data: ImageDataset, inputs: UInt8Array, tmp_path: Path
) -> None:
    network, header = load(write_student(tmp_path / "s.safetensors", data, backbone="test_efficientnet"))
    quantized = quantised(network, inputs, "openvino", reduce_range=True).freeze()
    model = with_integer_weights(to_graph(quantized, header.input, batch=0))
    int8 = [numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.data_type == TensorProto.INT8]
    for depthwise, most in ((True, 127), (False, 64)):
        weights = [values for values in int8 if values.ndim == 4 and (values.shape[1] == 1) == depthwise]
        assert max(int(np.abs(values.astype(np.int32)).max()) for values in weights) == most


@pytest.mark.slow
def test_the_first_convolution_of_openvino_s_graph_does_not_learn(
    student: Path, data: ImageDataset, inputs: UInt8Array
) -> None:
    network, _ = load(student)
    openvino, other = (quantised(network, inputs, to) for to in ("openvino", "tensorrt-onnx"))
    (stem,) = dict(other.named_parameters()).keys() - dict(openvino.named_parameters()).keys()
    assert stem.endswith("conv1.0.weight")
    assert stem in dict(openvino.named_buffers())


@pytest.mark.slow
def test_a_pruned_student_is_rebuilt_from_its_plan(student: Path, birds: Path, tmp_path: Path) -> None:
    pruned = prune(student, birds, tmp_path, CONFIG, PruningConfig(macs=0.8, round_to=4), hardware=HERE)
    path = quantize(pruned, birds, tmp_path, "tensorrt-onnx", teacher_path=student)
    network, header = load_quantized(path)
    assert header.channels == read_header(pruned).channels != {}
    assert header.parent == sha256(pruned)
    assert network(torch.zeros(2, 32, 32, 3, dtype=torch.uint8)).shape == (2, 2)
    other = replace(header, quantized=Quantized(to="openvino", torch="1.0"))
    save(tmp_path / "other.safetensors", network, other)
    with pytest.raises(CheckpointError, match=r"does not fit the test_resnet .*it was trained with torch 1\.0"):
        load_quantized(tmp_path / "other.safetensors")


def test_a_tensor_that_the_graph_does_not_have_is_refused(student: Path) -> None:
    graph = trace(load(student)[0], SPEC, fold_scale=False).graph
    params = QuantParams(np.array(0.1, np.float32), np.array(0, np.int8))
    with pytest.raises(ExportError, match="absent lies inside an operator of this network, where training cannot"):
        QuantizedNetwork(graph, {"absent": params})


@pytest.mark.parametrize(
    ("to", "precision", "reduce_range", "fits"),
    [
        ("onnx", "int8", None, True),
        ("onnx", "int8", True, True),
        ("onnx", "int8", False, False),
        ("onnx", "fp32", None, False),
        ("openvino", "int8", None, False),
    ],
)
def test_an_export_is_the_one_that_was_trained_for(
    to: TargetName, precision: str, reduce_range: bool | None, fits: bool
) -> None:
    trained = Quantized(to="onnx", reduce_range=True, torch="2")
    config = QuantizationConfig(reduce_range=reduce_range)
    said = pytest.raises(ExportError, match="was trained for --to onnx --precision int8 --reduce-range, not for --to")
    with contextlib.nullcontext() if fits else said:
        check_trained_for(Path("qat.safetensors"), trained, to, precision, config)
