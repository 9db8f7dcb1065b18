"""What pruning left of a network: operations, parameters and measured time, as shares of the unpruned network's."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch_pruning
from torch import nn

from edgefg import runtime
from edgefg.evaluation.timing import alternate
from edgefg.export.targets import target_of
from edgefg.export.tracing.onnx_exporter import write_onnx
from edgefg.preprocess import InputSpec, UInt8Array
from edgefg.runtime import Runtime
from edgefg.settings.pruning import Cost
from edgefg.settings.quantization import QuantizationConfig
from edgefg.training.models.network import Network

_WARM_UP = 10
_PREDICTIONS = 200
# On a machine that trains meanwhile, the threads of half of all predictions wait for a core: medians of one pair of
# networks gave 0.1 to 1.2, the quicker fifth 0.82 to 0.87.
_PERCENTILE = 20


class Shares(NamedTuple):
    """What is left of a network, 1: all of it."""

    macs: float
    """Of the multiply-accumulates."""
    params: float
    """Of the parameters."""
    latency: float | None = None
    """Of the time of an undisturbed prediction; None where it was not measured."""

    def of(self, measure: Cost) -> float:
        """Return one of them. Raises `ValueError` where it was not measured."""
        share: float | None = getattr(self, measure)
        if share is None:
            raise ValueError(f"the {measure} was not measured")
        return share

    def render(self) -> str:
        """Return all of them as words: neither the operations nor the parameters tell the time."""
        time_left = "" if self.latency is None else f", {self.latency:.3f} of the latency"
        return f"{self.macs:.3f} of the MACs, {self.params:.3f} of the parameters{time_left}"


class Stopwatch:
    """Times networks, exported to ONNX and run by ONNX Runtime on this machine, beside an unpruned one.

    Args:
        original: the unpruned network.
        spec: what it takes.
        calibration: ``uint8 [K, height, width, 3]`` RGB: times are those of INT8 networks; None: of FP32.

    Raises:
        ExportError: the network cannot be exported.
    """

    def __init__(self, original: Network, spec: InputSpec, calibration: UInt8Array | None = None) -> None:
        self._spec = spec
        self._calibration = calibration
        self._original = self._open(original)

    def share(self, network: Network) -> float:
        """Return the time of a prediction, batch 1, as a share of the unpruned network's.

        Raises `ExportError`; see `relative_time`.
        """
        pruned = self._open(network)
        try:
            return relative_time(pruned, self._original)
        finally:
            pruned.close()

    def _open(self, network: Network) -> Runtime:
        with tempfile.TemporaryDirectory(prefix="edgefg-") as scratch:
            path = Path(scratch) / "fp32.onnx"
            write_onnx(network.eval(), self._spec, path)
            if self._calibration is not None:  # quantised as the export will be
                quantizer = target_of("onnx").quantizer(path, self._calibration, QuantizationConfig())
                path = quantizer.write(Path(scratch))
            return runtime.load(path)


def relative_time(runtime: Runtime, reference: Runtime) -> float:
    """Return the time of an undisturbed prediction as a share of the reference's; both take one image of the same size.

    The ratio of the 20th percentiles; the predictions alternate, so that a machine that gets slower does so for both.
    """
    shape = [size or 1 for size in runtime.input.shape]
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    calls = [lambda: runtime.infer(image), lambda: reference.infer(image)]
    own, other = np.percentile(alternate(calls, turns=_PREDICTIONS, warm_up=_WARM_UP), _PERCENTILE, axis=1)
    return float(own / other)


class Yardstick:
    """Measures pruned networks against the unpruned one.

    Args:
        original: the unpruned network; kept, not changed.
        spec: what it takes.
        stopwatch: times it as well; None leaves the latency out.
    """

    def __init__(self, original: Network, spec: InputSpec, stopwatch: Stopwatch | None = None) -> None:
        self.original = original
        self.example = torch.zeros(1, 3, spec.height, spec.width)
        self._stopwatch = stopwatch
        self._macs, self._params = self._count(original)

    def measure(self, network: Network) -> Shares:
        """Return what is left. Raises `ExportError` where the time is asked for and the network does not export."""
        macs, params = self._count(network)
        latency = self._stopwatch.share(network) if self._stopwatch is not None else None
        return Shares(macs / self._macs, params / self._params, latency)

    def _count(self, network: Network) -> tuple[float, float]:
        body: nn.Module = copy.deepcopy(network.backbone)  # the count leaves attributes behind
        macs, params = torch_pruning.utils.count_ops_and_params(body, self.example)
        return float(macs), float(params)
