"""Costs of a pruned network relative to the unpruned one: operations, parameters and measured latency."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch_pruning
from torch import nn

from edgefg import runtime
from edgefg.artifact.stages import RelativeCost
from edgefg.evaluation.timing import alternate
from edgefg.export.targets import target_of
from edgefg.export.tracing.onnx_exporter import write_onnx
from edgefg.preprocess import InputSpec, UInt8Array
from edgefg.runtime import Runtime
from edgefg.settings.quantization import QuantizationConfig
from edgefg.training.models.network import Network

_WARM_UP = 10
_PREDICTIONS = 200
# While the machine is training, half of all predictions wait for a core. Ratios of medians of one pair of networks
# ranged from 0.1 to 1.2, those of 20th percentiles from 0.82 to 0.87.
_PERCENTILE = 20


class LatencyMeter:
    """Measures latencies of networks in ONNX Runtime on this machine, relative to an unpruned network.

    Args:
        original: the unpruned network.
        spec: its input.
        calibration: ``uint8 [K, height, width, 3]`` RGB. The networks are quantised to INT8 with them. None: FP32.

    Raises:
        ExportError: the network cannot be exported.
    """

    def __init__(self, original: Network, spec: InputSpec, calibration: UInt8Array | None = None) -> None:
        self._spec = spec
        self._calibration = calibration
        self._original = self._open(original)

    def relative_latency(self, network: Network) -> float:
        """Return the latency of a prediction with batch 1, relative to the unpruned network. Raises `ExportError`."""
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
    """Return the time of an undisturbed prediction relative to a reference. Both take one image of the same size.

    It is the ratio of the 20th percentiles. Predictions alternate, so that a slower machine slows both down.
    """
    shape = [size or 1 for size in runtime.input.shape]
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    calls = [lambda: runtime.infer(image), lambda: reference.infer(image)]
    own, other = np.percentile(alternate(calls, turns=_PREDICTIONS, warm_up=_WARM_UP), _PERCENTILE, axis=1)
    return float(own / other)


class CostModel:
    """Computes the costs of pruned networks relative to the unpruned one.

    Args:
        original: the unpruned network. It is kept, and not changed.
        spec: its input.
        latency_meter: measures latencies. None: they are not measured.
    """

    def __init__(self, original: Network, spec: InputSpec, latency_meter: LatencyMeter | None = None) -> None:
        self.original = original
        self.example = torch.zeros(1, 3, spec.height, spec.width)
        self._latency_meter = latency_meter
        self._macs, self._params = self._count(original)

    def relative_cost(self, network: Network) -> RelativeCost:
        """Return the costs. Raises `ExportError` if latencies are measured and the network cannot be exported."""
        macs, params = self._count(network)
        meter = self._latency_meter
        latency = None if meter is None else meter.relative_latency(network)
        return RelativeCost(macs=macs / self._macs, params=params / self._params, latency=latency)

    def _count(self, network: Network) -> tuple[float, float]:
        body: nn.Module = copy.deepcopy(network.backbone)  # counting leaves attributes behind
        macs, params = torch_pruning.utils.count_ops_and_params(body, self.example)
        return float(macs), float(params)
