"""Where a quantised graph rounds activations, and how: read off what the emitters of `edgefg.export.quantize.qdq` made.

Training then rounds exactly where the target's own quantiser does, whatever its rules are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from edgefg.errors import ExportError
from edgefg.export.onnx.graph import Graph
from edgefg.export.qat.fake_quantize import Rounding

_LEVELS = 256


def quantizers_of_onnx(model: onnx.ModelProto) -> dict[str, Rounding]:
    """Return the quantisers of activations of a QDQ graph by the name of the tensor that they round."""
    graph = Graph(model)
    found = {}
    for node in graph.nodes:
        if node.op_type != "QuantizeLinear" or node.input[0] in graph.constants:
            continue
        name, caster = node.input[0], graph.writer(node.input[0])
        # What FP16 cannot compute is cast back.
        if caster is not None and caster.op_type == "Cast" and graph.writer(caster.input[0]) is not None:
            name = caster.input[0]
        found[name] = Rounding(graph.array(node.input[1]).astype(np.float32), graph.array(node.input[2]))
    return found


def quantizers_of_openvino(model: Any) -> dict[str, Rounding]:
    """Return the quantisers of activations of an `openvino.Model` by the name of the tensor that they round.

    Raises:
        ExportError: a tensor has lost the name that it had in the ONNX graph, or is not rounded to 256 levels.
    """
    found = {}
    for operation in model.get_ordered_ops():
        if operation.get_type_name() != "FakeQuantize":
            continue
        source = operation.input_value(0)
        names = sorted(source.get_names())
        if not names or operation.get_attributes()["levels"] != _LEVELS:
            where = names or source.get_node().get_friendly_name()
            raise ExportError(
                f"the quantiser of {where} has {operation.get_attributes()['levels']} levels and {len(names)} names;"
                f" needed {_LEVELS} and one: update NNCF, or train for tensorrt-onnx"
            )
        low, high = (operation.input_value(i).get_node().data.astype(np.float32) for i in (1, 2))
        low, high = (limits.reshape(-1) if limits.size > 1 else limits.reshape(()) for limits in (low, high))
        scale = (high - low) / (_LEVELS - 1)
        found[names[0]] = _quantizer(scale, np.round(-low / scale))
    return found


def _quantizer(scale: Any, zero: Any) -> Rounding:
    """Return a quantiser of 256 levels from zero points counted from the lowest level; signed where it is symmetric."""
    if (zero == _LEVELS // 2).all():
        return Rounding(scale, np.zeros(scale.shape, np.int8))
    return Rounding(scale, zero.astype(np.uint8))
