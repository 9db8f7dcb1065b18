"""Overhead of `Classifier.predict` over a bare OpenVINO request on the same IR.

    python -m edgefg.benchmarks.experiments.overhead model.xml [--threads 2] [--iterations 500]

Both run in one process, in turns, on one frame of the network's size. The bare request is the fastest call that
OpenVINO's own API offers: its input tensor is the frame's memory, its output is not copied, and nothing is decided.
Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edgefg.benchmarks.device import load_average
from edgefg.benchmarks.report import json_line
from edgefg.benchmarks.stats import Latency, summarize_latency
from edgefg.classifier import Classifier
from edgefg.errors import EdgefgError, RuntimeUnavailableError
from edgefg.evaluation.tables import table
from edgefg.evaluation.timing import alternate
from edgefg.preprocess import UInt8Array
from edgefg.signals import kept_signal_stack


class Overhead(msgspec.Struct, frozen=True, kw_only=True):
    """Two latencies from one run, in milliseconds, and their ratio."""

    path: str
    threads: int | None
    predict: Latency
    """`Classifier.predict`."""
    bare: Latency
    """The bare request."""
    ratio: float
    """p50 of the first over p50 of the second."""
    load_before: float | None
    load_after: float | None


def measure_overhead(path: Path, *, threads: int | None = None, iterations: int = 500, warmup: int = 50) -> Overhead:
    """Time both in turns.

    Args:
        path: an IR, ``.xml``, with its manifest.
        threads: CPU threads for each of the two.
        iterations: timed calls of each.
        warmup: untimed calls of each before.

    Raises:
        EdgefgError: the artifact cannot be used, or OpenVINO is not installed.
    """
    load_before = load_average()
    with Classifier(path, threads=threads) as classifier:
        spec = classifier.manifest.input
        frame = np.random.default_rng(0).integers(0, 256, (spec.height, spec.width, 3), np.uint8)
        # The request gets the very values that predict prepares, without preparing them.
        bare = bare_request(path, np.ascontiguousarray(frame[np.newaxis, :, :, ::-1]), threads)
        seconds = alternate([lambda: classifier.predict(frame), bare], turns=iterations, warm_up=warmup)
    ours, theirs = (summarize_latency([series]) for series in (1e3 * seconds).tolist())
    return Overhead(
        path=str(path),
        threads=threads,
        predict=ours,
        bare=theirs,
        ratio=ours.p50 / theirs.p50,
        load_before=load_before,
        load_after=load_average(),
    )


def bare_request(path: Path, batch: UInt8Array, threads: int | None) -> Callable[[], Any]:
    """Compile the IR as `edgefg.runtimes.openvino` does and return one inference on ``batch`` as a call."""
    try:
        # The one vendor import of this room: the peer to measure against is the vendor's API itself.
        import openvino as ov
    except ImportError as exc:
        raise RuntimeUnavailableError(
            "this benchmark needs OpenVINO, which is not installed: pip install 'edgefg[openvino]'"
        ) from exc
    config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    if threads is not None:
        config["INFERENCE_NUM_THREADS"] = threads
    with kept_signal_stack():
        request = ov.Core().compile_model(path, "CPU", config).create_infer_request()
    request.set_input_tensor(ov.Tensor(batch, shared_memory=True))
    return functools.partial(_infer, request, batch)


def _infer(request: Any, batch: UInt8Array) -> Any:
    """Run the request; ``batch`` is handed in only to stay alive, for the request reads its memory."""
    return request.infer(share_outputs=True)


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m edgefg.benchmarks.experiments.overhead")
    parser.add_argument("artifact", type=Path, help="an IR (.xml) with its manifest")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--iterations", type=int, default=500)
    arguments = parser.parse_args()
    try:
        result = measure_overhead(arguments.artifact, threads=arguments.threads, iterations=arguments.iterations)
    except EdgefgError as exc:
        parser.error(str(exc))
    rows = [
        {"call": name, **{key: f"{getattr(latency, key):.3f}" for key in ("p50", "p90", "p99", "mean", "minimum")}}
        for name, latency in (("Classifier.predict", result.predict), ("bare OpenVINO request", result.bare))
    ]
    print(table(rows))
    print(f"p50 ratio {result.ratio:.3f}, {result.predict.count} calls each, milliseconds")
    print(json_line(result))


if __name__ == "__main__":
    main()
