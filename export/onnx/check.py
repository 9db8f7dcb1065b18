"""Report of an ONNX file that is checked against the rules of `edgefg.export.onnx.rules`.

edgefg check model.onnx --for tensorrt
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import onnx

from edgefg.errors import DataError, one_line
from edgefg.export.onnx.rules import RULES, broken_rules, full_precision_reason


class Violation(msgspec.Struct, frozen=True):
    """One place where the graph breaks a rule."""

    rule: str
    node: str
    found: str
    needed: str
    fix: str
    refused: bool
    """Whether TensorRT refuses the graph because of it; otherwise it runs slower or less exactly."""


class CheckReport(msgspec.Struct, frozen=True):
    """Result of `check`."""

    model: str
    nodes: int
    quantised: int
    """Number of QuantizeLinear nodes."""
    rules: int
    broken: tuple[Violation, ...]
    float32: str = ""
    """Why the floating-point part is FP32, as the graph's quantiser stated in the file."""

    def render(self) -> str:
        """Return the report as text for people."""
        head = f"{self.model}: {self.nodes} nodes, {self.quantised} of them QuantizeLinear, {self.rules} rules"
        stated = f"; floating point is FP32: {self.float32}" if self.float32 else ""
        if not self.broken:
            return f"{head}: all hold{stated}"
        refused = sum(violation.refused for violation in self.broken)
        return "\n".join(
            [f"{head}: broken in {len(self.broken)} places, for {refused} of which TensorRT refuses the graph{stated}"]
            + [f"  {v.node}: {v.rule}: {v.found}; expected {v.needed}: {v.fix}" for v in self.broken]
        )


def check(model: Path) -> CheckReport:
    """Check an ONNX file.

    Raises:
        DataError: it is missing or not an ONNX file.
    """
    try:
        graph = onnx.load(model)
        # Not the full check, which fails on mixed types without naming a fix; a rule of ours does.
        onnx.checker.check_model(graph)
    except Exception as exc:  # protobuf, onnx and Python each have their own
        raise DataError(f"{model} is not a readable ONNX file ({one_line(exc)[:200]})") from exc
    broken = tuple(
        Violation(b.rule, b.node, b.found, RULES[b.rule].asks, RULES[b.rule].fix, b.refused)
        for b in broken_rules(graph)
    )
    quantised = sum(node.op_type == "QuantizeLinear" for node in graph.graph.node)
    nodes, reason = len(graph.graph.node), full_precision_reason(graph)
    return CheckReport(str(model), nodes, quantised, len(RULES), broken, reason)
