"""FP32 ONNX → FP16 ONNX, for TensorRT's strongly typed networks, which compute in the types that a graph has.

The uint8 input still feeds one Cast, now to FP16, which holds every level exactly; the logits leave as FP32.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from edgefg.errors import ExportError, one_line
from edgefg.export.quiet import quiet

_GREATEST = float(np.finfo(np.float16).max)


def to_half(source: Path, target: Path) -> None:
    """Write the FP16 form of an FP32 ONNX file, by ONNX Runtime's converter.

    Raises:
        ExportError: a weight is beyond FP16's range, or the converter failed.
    """
    model = onnx.load(source)
    for tensor in model.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        largest = float(np.abs(numpy_helper.to_array(tensor)).max(initial=0.0))
        # The converter would cut it off with no more than a warning.
        if not largest <= _GREATEST:
            raise ExportError(f"{tensor.name} holds {largest:g}, FP16 reaches {_GREATEST:g}; keep --precision fp32")
    try:
        with quiet():
            from onnxruntime.transformers.float16 import convert_float_to_float16

            half = convert_float_to_float16(model, keep_io_types=True)
        onnx.checker.check_model(half, full_check=True)
    except Exception as exc:  # the converter and the checker raise what they come upon
        raise ExportError(f"the network could not be cast to FP16: {one_line(exc)[:300]}") from exc
    target.write_bytes(half.SerializeToString())
