"""ONNX Runtime sessions of the exporter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from edgefg.errors import ExportError
from edgefg.export.onnx.session import graph_logits, open_session
from edgefg.runtimes.onnxruntime import EXACT_SUMS
from tests.export.onnx.small import model_of, node

MODEL = model_of(
    [node("Cast", "images", "f", to=TensorProto.FLOAT), node("ReduceMean", "f axes", "logits", keepdims=0)],
    {"axes": np.array([2, 3])},
    kind=TensorProto.UINT8,
    shape=(1, 3),
)


@pytest.mark.parametrize("optimise", [True, False])
def test_batches_are_computed_and_joined(optimise: bool, tmp_path: Path) -> None:
    onnx.save(MODEL, tmp_path / "a.onnx")
    data = [np.full((1, 3, 4, 4), level, np.uint8) for level in (0, 7, 200)]
    for model in (MODEL.SerializeToString(), str(tmp_path / "a.onnx")):
        found = graph_logits(model, data, optimise=optimise)
        np.testing.assert_array_equal(found, np.array([[0] * 3, [7] * 3, [200] * 3], np.float32))


def test_sums_are_exact() -> None:
    options = open_session(MODEL.SerializeToString()).get_session_options()
    assert options.get_session_config_entry(EXACT_SUMS[0]) == EXACT_SUMS[1]


def test_a_graph_that_cannot_run_is_one_line() -> None:
    with pytest.raises(ExportError, match="ONNX Runtime cannot run the graph: ") as caught:
        graph_logits(b"no graph", [np.zeros((1, 3, 4, 4), np.uint8)])
    assert "\n" not in str(caught.value)
    with pytest.raises(ExportError, match="ONNX Runtime cannot run the graph: "):
        graph_logits(MODEL.SerializeToString(), [np.zeros((1, 3, 4, 5), np.uint8)])
