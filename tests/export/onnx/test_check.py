"""The report of a checked graph; `test_rules` has the rules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from edgefg.errors import DataError
from edgefg.export.onnx.check import check
from edgefg.export.onnx.rules import RULES
from tests.export.onnx.small import model_of, node


def test_a_graph_that_keeps_all_rules(tmp_path: Path) -> None:
    onnx.save(model_of([node("Relu", "images", "logits")]), tmp_path / "a.onnx")
    report = check(tmp_path / "a.onnx")
    assert (report.nodes, report.quantised, report.rules, report.broken) == (1, 0, len(RULES), ())
    assert report.render() == f"{tmp_path}/a.onnx: 1 nodes, 0 of them QuantizeLinear, {len(RULES)} rules: all hold"


def test_each_broken_rule_is_a_line_with_its_fix(tmp_path: Path) -> None:
    nodes = [node("QuantizeLinear", "images scale", "q"), node("DequantizeLinear", "q scale", "logits")]
    onnx.save(model_of(nodes, {"scale": np.float32(-1)}), tmp_path / "a.onnx")
    report = check(tmp_path / "a.onnx")
    found = {violation.rule: violation for violation in report.broken}
    assert {"symmetric-int8", "positive-scale"} <= set(found)
    violation = found["positive-scale"]
    assert (violation.needed, violation.fix) == (RULES["positive-scale"].asks, RULES["positive-scale"].fix)
    head, *lines = report.render().splitlines()
    assert len(lines) == len(report.broken)
    assert f"broken in {len(lines)} places" in head
    assert f"  {violation.node}: positive-scale: a scale of -1; expected {violation.needed}: {violation.fix}" in lines


def test_what_is_not_an_onnx_file(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"\x00garbage")
    for name in ("a.onnx", "missing.onnx"):
        with pytest.raises(DataError, match=rf"{name} is not a readable ONNX file \("):
            check(tmp_path / name)
