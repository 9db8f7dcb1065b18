"""Network → FP32 ONNX: uint8 input cast first, normalisation inside, batch norms and zero padding folded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import nn

from edgefg.data.calibration import batches
from edgefg.errors import ExportError, one_line
from edgefg.export.onnx.session import graph_logits
from edgefg.preprocess import InputSpec, UInt8Array
from edgefg.quiet import quiet
from edgefg.training.checkpoint import Header
from edgefg.training.models.network import Network

OPSET = 18
"""Opset of exported graphs. ONNX Runtime's quantiser writes int8 QDQ that TensorRT reads for opsets 13 to 20."""
PARITY = 1e-4
"""Greatest deviation of an FP32 graph from its parent, as a share of the greatest logit."""
_BATCH_AT_ONCE = 8


def need_one_graph(network: Network, header: Header, path: Path, verb: str) -> None:
    """Raise `ExportError` unless a network is a single pass. ``verb`` is the command that needs its student instead."""
    if not network.single_pass:
        raise ExportError(
            f"{path} is a {header.method} teacher, which looks at an image several times and is not a single graph."
            f" Distil it with `edgefg distill` and {verb} the student."
        )


def write_onnx(network: nn.Module, spec: InputSpec, path: Path, *, batch: int = 1) -> None:
    """Export a network in evaluation mode to one ``.onnx`` file without external data.

    Args:
        network: takes ``uint8 [N, height, width, 3]`` RGB, gives ``float32 [N, classes]``.
        spec: the network's input.
        path: where to write. The graph's input is called ``images``, its output ``logits``.
        batch: fixed batch size; 0 leaves the batch dimension free.

    Raises:
        ExportError: the exporter does not support the network, or the graph fails `check_graph`.
    """
    with contiguous_planes(network):
        model = to_graph(network, spec, batch=batch)
    path.write_bytes(model.SerializeToString())


def to_graph(network: nn.Module, spec: InputSpec, *, batch: int = 1) -> onnx.ModelProto:
    """Export a network as `write_onnx` does, and return the graph. Raises `ExportError` as it does."""
    return _checked(_run_exporter(network, spec, batch))


def to_graph_and_program(
    network: nn.Module, spec: InputSpec, *, batch: int = 1
) -> tuple[onnx.ModelProto, torch.export.ExportedProgram]:
    """Export a network as `write_onnx` does; return the graph and the program that it was translated from.

    Tensors of the graph have the names of the program's nodes. Exceptions are tensors inside an operator that ONNX
    lacks, and names that a parameter or buffer of the network has too.

    Raises:
        ExportError: as `write_onnx`.
    """
    onnx_program = _run_exporter(network, spec, batch)
    program = onnx_program.exported_program
    assert program is not None  # of a dynamo export
    return _checked(onnx_program), program


def _run_exporter(network: nn.Module, spec: InputSpec, batch: int) -> torch.onnx.ONNXProgram:
    # With two images, torch.export does not mistake a free batch for the constant 1.
    example = torch.zeros(batch or 2, spec.height, spec.width, 3, dtype=torch.uint8)
    free: dict[str, Any] = {} if batch else {"dynamic_shapes": {"images": {0: torch.export.Dim("batch")}}}
    try:
        with quiet():
            onnx_program = torch.onnx.export(
                network, (example,), dynamo=True, opset_version=OPSET, input_names=["images"], output_names=["logits"],
                external_data=False, optimize=True, verbose=False, **free,
            )  # fmt: skip
    except Exception as exc:  # the exporter raises a family of its own, torch's and Python's
        raise ExportError(f"the network does not export to ONNX: {one_line(exc)[:300]}") from exc
    if onnx_program is None:
        raise ExportError("the network does not export to ONNX: the exporter returned nothing. Update torch.")
    return onnx_program


def _checked(onnx_program: torch.onnx.ONNXProgram) -> onnx.ModelProto:
    model = onnx_program.model_proto
    _strip(model)
    check_graph(model)
    return model


@contextlib.contextmanager
def contiguous_planes(network: nn.Module) -> Iterator[None]:
    """Make the network normalise to a contiguous tensor during an export; this adds no node.

    Permuted NHWC images look like channels-last tensors, whose pooling would be exported as a Gather of indices.
    """
    shadowed: Any = network
    normalised = shadowed.normalised
    shadowed.normalised = lambda images: normalised(images).contiguous()
    try:
        yield
    finally:
        del shadowed.normalised


def _strip(model: onnx.ModelProto) -> None:
    """Remove stack traces and class names, so that the same network gives the same bytes on every machine."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""


def check_graph(model: onnx.ModelProto) -> None:
    """Raise `ExportError` unless the graph is valid ONNX from one uint8 input, cast first, to one float output."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as exc:
        raise ExportError(f"the exported graph is not valid ONNX: {one_line(exc)[:300]}") from exc
    graph = model.graph
    if len(graph.input) != 1 or len(graph.output) != 1:
        raise ExportError(
            f"the graph has {len(graph.input)} inputs and {len(graph.output)} outputs instead of one each"
        )
    readers = [node.op_type for node in graph.node if graph.input[0].name in node.input]
    if readers != ["Cast"]:
        raise ExportError(f"the uint8 input feeds {', '.join(readers) or 'nothing'} instead of one Cast")


def check_parity(network: nn.Module, path: Path, inputs: UInt8Array) -> float:
    """Compare an FP32 ONNX file in ONNX Runtime with its network; return the greatest deviation of a logit.

    Args:
        network: the parent, in evaluation mode.
        path: the file.
        inputs: ``uint8 [K, height, width, 3]`` RGB.

    Raises:
        ExportError: the deviation exceeds `PARITY` times the greatest logit.
    """
    batch = onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_value or len(inputs)
    found = graph_logits(str(path), batches(inputs, batch))[: len(inputs)]
    expected = torch_logits(network, inputs)
    deviation = float(np.abs(found - expected).max())
    allowed = PARITY * float(np.abs(expected).max())
    if not deviation <= allowed:  # a NaN fails
        raise ExportError(
            f"the ONNX graph deviates from the network by {deviation:.3g}, more than the allowed {allowed:.3g}: the"
            " exporter changed the arithmetic. Try another backbone, or another version of torch."
        )
    return deviation


def torch_logits(network: nn.Module, inputs: UInt8Array) -> npt.NDArray[np.float32]:
    """Return a network's logits, ``float32 [K, classes]``, for ``uint8 [K, height, width, 3]``."""
    with torch.inference_mode():
        parts = [network(torch.from_numpy(part)) for part in np.array_split(inputs, -(-len(inputs) // _BATCH_AT_ONCE))]
    logits: npt.NDArray[np.float32] = torch.cat(parts).numpy()
    return logits
