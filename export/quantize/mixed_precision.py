"""Which layers have to stay in floating point so that INT8 costs no more accuracy than is allowed.

One greedy search for every target. NNCF's ``quantize_with_accuracy_control`` would serve OpenVINO alone, ranks and
reverts by rules of its own, and could not tell TensorRT's graph from ONNX Runtime's; here the order comes from the scan
(`edgefg.export.quantize.layer_sensitivity`), and the number of kept layers doubles, so that a network of 50 layers is
quantised and measured at most eight times.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from edgefg.data.calibration import batches, choose_balanced, read_calibration
from edgefg.data.split import Sample
from edgefg.errors import ExportError
from edgefg.export.quantize.layer_sensitivity import logits_of, scan
from edgefg.export.quantize.quantizer import Quantizer
from edgefg.image_io import read_image
from edgefg.preprocess import InputSpec, UInt8Array, prepare

_Built = TypeVar("_Built")
# Images that the layers are ranked on.
_SCANNED = 32
_AT_ONCE = 16


class Kept(NamedTuple):
    """What a search found."""

    layers: tuple[str, ...]
    """Names of the layers that stay in floating point, what hurts most first; empty where none has to."""
    drop: float
    """What is lost against FP32 then, in points of top-1; negative where something is won."""


def search(
    build: Callable[[frozenset[str]], _Built],
    measure: Callable[[_Built], float],
    order: Callable[[], Sequence[str]],
    limit: float,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[_Built, Kept]:
    """Keep no layer, then the first one of the order, the first two, four, …, all, until what is lost is allowed.

    Args:
        build: quantises all layers but the given ones.
        measure: returns how many points of top-1 that loses against FP32.
        order: returns all layers, what hurts most first; called once, and only where INT8 throughout loses too much.
        limit: how many points may be lost.
        say: told each try.

    Returns:
        What ``build`` built last, and what was kept for it.

    Raises:
        ExportError: even with all layers in floating point more is lost.
    """
    layers: Sequence[str] = ()
    count = 0
    while True:
        built = build(frozenset(layers[:count]))
        found = Kept(tuple(layers[:count]), measure(built))
        say(f"with {count or 'no'} layers in floating point INT8 loses {found.drop:.2f} points, allowed are {limit:g}")
        if found.drop <= limit:
            return built, found
        if count == 0:
            layers = order()
        if count == len(layers):  # none of none too
            raise ExportError(
                f"INT8 loses {found.drop:.2f} points of top-1 on the validation images even with all {count} layers in"
                f" floating point, allowed are {limit:g}; allow more, or export fp16 or fp32"
            )
        count = min(max(1, 2 * count), len(layers))


def find_kept(
    quantizer: Quantizer,
    samples: Sequence[Sample],
    spec: InputSpec,
    limit: float,
    *,
    batch: int = 1,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[str, ...]:
    """Return the layers to keep so that top-1 on labelled images drops by no more than ``limit`` points below FP32's.

    Args:
        quantizer: of the network; its file is written, measured and thrown away.
        samples: labelled images, the validation split: what is chosen on them flatters them a little.
        spec: the network's input.
        limit: percentage points.
        batch: the graph's fixed batch size; 0 where it is free.
        say: told each step.

    Raises:
        DataError: an image cannot be read.
        ExportError: the network cannot be quantised, or no number of layers is enough.
    """

    def drop(model: Path) -> float:
        return 100 * (reference - _top1(model, samples, spec, batch))

    def order() -> list[str]:
        say(f"scanning {len(quantizer.layers)} layers for what hurts most")
        inputs = read_calibration(choose_balanced(samples, _SCANNED), spec).inputs
        return [row.layer for row in scan(quantizer, inputs, batch).layers]

    with tempfile.TemporaryDirectory(prefix="edgefg-") as scratch:
        reference = _top1(quantizer.source, samples, spec, batch)
        _, kept = search(lambda keep: quantizer.write(Path(scratch), keep), drop, order, limit, say)
    if kept.layers:
        say(f"kept in floating point: {', '.join(kept.layers)}")
    return kept.layers


def _top1(model: Path, samples: Sequence[Sample], spec: InputSpec, batch: int) -> float:
    """Return a model file's share of right answers; images are read as they are needed."""
    size = batch or _AT_ONCE

    def data() -> Iterator[UInt8Array]:
        for first in range(0, len(samples), size):
            rows = np.stack([prepare(read_image(path), spec) for path, _ in samples[first : first + size]])
            yield from batches(rows, batch or len(rows))

    found = np.concatenate([logits.argmax(axis=1) for logits in logits_of(model, data())])[: len(samples)]
    return float((found == [label for _, label in samples]).mean())
