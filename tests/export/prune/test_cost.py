from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgefg import runtime
from edgefg.artifact.stages import RelativeCost
from edgefg.export.prune import cost
from edgefg.export.prune.channels import remove_channels
from edgefg.export.prune.cost import CostModel, LatencyMeter, relative_time
from edgefg.export.tracing.onnx_exporter import write_onnx
from edgefg.preprocess import InputSpec
from edgefg.runtime import TensorSpec
from edgefg.settings.pruning import PruningConfig
from edgefg.training.models.backbone import build_backbone
from edgefg.training.models.network import Network
from tests.export.prune.pruning import SPEC, gradients_of


def network() -> Network:
    torch.manual_seed(0)
    return Network(build_backbone("test_efficientnet", 3), (127.0,) * 3, (60.0,) * 3).eval()


class Clock:
    """Stands for the machine's; a runtime moves it by what a prediction takes."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slowdown = 1.0

    def perf_counter(self) -> float:
        return self.now


class Fake:
    """A runtime whose predictions take as long as it says; of each three, two are disturbed."""

    version = "fake"
    input = TensorSpec((1, 8, 8, 3), "uint8")

    def __init__(self, clock: Clock, seconds: float) -> None:
        self.clock, self.seconds, self.calls = clock, seconds, 0

    def infer(self, batch: np.ndarray) -> np.ndarray:
        assert batch.shape == (1, 8, 8, 3)
        self.calls += 1
        self.clock.now += self.seconds * self.clock.slowdown * (9 if self.calls % 3 else 1)
        self.clock.slowdown *= 1.005
        return np.zeros((1, 3), np.float32)

    def close(self) -> None:
        pass


def test_neither_a_drift_nor_disturbances_move_the_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine gets several times slower meanwhile, and most predictions take nine times as long."""
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock.perf_counter)
    assert relative_time(Fake(clock, 0.004), Fake(clock, 0.005)) == pytest.approx(0.8, rel=0.05)
    assert clock.slowdown > 5


def test_the_original_is_all_of_itself() -> None:
    original = network()
    left = CostModel(original, SPEC).relative_cost(original)
    assert left == RelativeCost(macs=1.0, params=1.0)
    assert left.render() == "1.000 of the MACs, 1.000 of the parameters"
    with pytest.raises(ValueError, match="latency was not measured"):
        left.of("latency")
    assert RelativeCost(macs=0.5, params=0.6, latency=0.7).render().endswith(", 0.700 of the latency")


def test_parameters_and_operations_are_counted_where_they_are() -> None:
    """Half of the last convolution's outputs: its weights and the head's halve, and so do their multiplications."""
    original, narrow = network(), network()
    body: Any = narrow.backbone
    wide, kept = body.conv_head.out_channels, body.conv_head.out_channels // 2
    body.conv_head = torch.nn.Conv2d(body.conv_head.in_channels, kept, 1, bias=False)
    body.bn2 = type(body.bn2)(kept)
    body.classifier = torch.nn.Linear(kept, 3)
    left = CostModel(original, SPEC).relative_cost(narrow)
    counts = [sum(p.numel() for p in each.backbone.parameters()) for each in (narrow, original)]
    assert left.params == pytest.approx(counts[0] / counts[1])
    assert counts[1] - counts[0] == (wide - kept) * (body.conv_head.in_channels + 2 + 3)
    assert 0 < left.macs < 1


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    write_onnx(network(), InputSpec(height=32, width=32), path)
    return path


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "int8"])
def test_times_are_those_of_the_exported_network(
    precision: str, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch's exporter is most of the time of an export.
    monkeypatch.setattr(cost, "write_onnx", lambda network, spec, path: shutil.copyfile(exported, path))
    opened: list[bytes] = []
    load = runtime.load

    def spied(path: Path) -> object:
        opened.append(path.read_bytes())
        return load(path)

    monkeypatch.setattr(runtime, "load", spied)
    original, spec = network(), InputSpec(height=32, width=32)
    inputs = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8) if precision == "int8" else None
    stopwatch = LatencyMeter(original, spec, inputs)
    assert 0.2 < stopwatch.relative_latency(original) < 5
    assert len(opened) == 2
    assert [b"QuantizeLinear" in model for model in opened] == [precision == "int8"] * 2


def test_pruning_to_a_latency_stops_at_the_first_step_that_is_quick_enough(caplog: pytest.LogCaptureFixture) -> None:
    """Of operations, 30 % are gone long before a tenth of the time is: they are not what is asked for."""
    times = iter([1.0, 1.02, 0.95, 0.89, 0.5])

    class Scripted(LatencyMeter):
        def __init__(self) -> None:
            pass

        def relative_latency(self, network: Network) -> float:
            return next(times)

    caplog.set_level("INFO", "edgefg")
    original = network()
    pruning = PruningConfig(latency=0.9, importance="magnitude", round_to=4, max_ratio=0.75)
    left = remove_channels(network(), pruning, CostModel(original, SPEC, Scripted()), 0.9, gradients_of())
    assert left.latency == 0.89
    assert next(times) == 0.5
    assert [line.rpartition(", ")[2] for line in caplog.messages] == [
        f"{t:.3f} of the latency" for t in (1.02, 0.95, 0.89)
    ]
    assert all("of the MACs" in line for line in caplog.messages)
