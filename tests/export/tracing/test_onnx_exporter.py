"""The FP32 graph: what it must look like, and that it computes what torch computes."""

from __future__ import annotations

import inspect
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from edgefg.errors import ExportError
from edgefg.export.tracing.onnx_exporter import OPSET, PARITY, check_graph, check_parity, torch_logits, write_onnx
from edgefg.preprocess import InputSpec, UInt8Array
from edgefg.training.checkpoint import load
from edgefg.training.models.network import Network


def test_graph_takes_raw_pixels_through_one_cast(lite0_onnx: Path) -> None:
    graph = onnx.load(lite0_onnx).graph
    (images,), (logits,) = graph.input, graph.output
    shape = [size.dim_value for size in images.type.tensor_type.shape.dim]
    assert (images.name, images.type.tensor_type.elem_type, shape) == ("images", TensorProto.UINT8, [1, 64, 64, 3])
    assert (logits.name, logits.type.tensor_type.elem_type) == ("logits", TensorProto.FLOAT)
    assert [node.op_type for node in graph.node if "images" in node.input] == ["Cast"]
    assert [node.op_type for node in graph.node][:4] == ["Cast", "Transpose", "Sub", "Div"]


def test_graph_is_folded_plain_and_without_traces(lite0_onnx: Path) -> None:
    model = onnx.load(lite0_onnx)
    counts = Counter(node.op_type for node in model.graph.node)
    assert set(counts) == {"Cast", "Transpose", "Sub", "Div", "Conv", "Clip", "Add", "ReduceMean", "Reshape", "Gemm"}
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    assert b"site-packages" not in model.SerializeToString()


def test_parity_with_torch(lite0: Path, lite0_onnx: Path, unseen: UInt8Array) -> None:
    network, _ = load(lite0)
    assert check_parity(network, lite0_onnx, unseen) <= PARITY * np.abs(torch_logits(network, unseen)).max()


def test_parity_check_sees_another_network(lite0: Path, lite0_onnx: Path, unseen: UInt8Array) -> None:
    network, _ = load(lite0)
    with torch.no_grad():
        next(network.backbone.parameters()).mul_(1.01)
    with pytest.raises(ExportError, match="deviates from the network"):
        check_parity(network, lite0_onnx, unseen[:2])


@pytest.mark.parametrize("batch", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_batches(resnet: tuple[Network, InputSpec], batch: int, tmp_path: Path) -> None:
    network, spec = resnet
    write_onnx(network, spec, tmp_path / "model.onnx", batch=batch)
    first = onnxruntime.InferenceSession(tmp_path / "model.onnx").get_inputs()[0].shape[0]
    assert first == (batch or "batch")
    inputs = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    check_parity(network, tmp_path / "model.onnx", inputs)


@pytest.mark.slow
def test_nothing_is_printed_or_warned_and_the_bytes_are_the_same_every_time(
    resnet: tuple[Network, InputSpec],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.onnx, "export", inspect.unwrap(torch.onnx.export))  # not from another test
    write_onnx(*resnet, tmp_path / "model.onnx")
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
    write_onnx(*resnet, tmp_path / "again.onnx")
    assert (tmp_path / "model.onnx").read_bytes() == (tmp_path / "again.onnx").read_bytes()


class _Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)) if bool(x.sum() > 0) else x.amax((2, 3))


def test_network_that_does_not_export(tmp_path: Path) -> None:
    network = Network(_Branching(), (0.0,) * 3, (1.0,) * 3).eval()
    with pytest.raises(ExportError, match=r"does not export to ONNX: .+") as caught:
        write_onnx(network, InputSpec(height=8, width=8), tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "model.onnx").exists()


def test_graph_without_a_leading_cast_is_refused() -> None:
    nodes = [
        helper.make_node("Transpose", ["images"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["planes"], ["logits"], to=TensorProto.FLOAT),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, [1, 4, 4, 3])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 3, 4, 4])
    model = helper.make_model(
        helper.make_graph(nodes, "g", [images], [logits]), opset_imports=[helper.make_opsetid("", OPSET)]
    )
    with pytest.raises(ExportError, match="feeds Transpose instead of one Cast"):
        check_graph(model)
