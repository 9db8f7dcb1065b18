"""Mixed precision: which layers have to stay in floating point so that INT8 costs no more accuracy than is allowed.

One greedy search for every target. NNCF's ``quantize_with_accuracy_control`` would serve OpenVINO only, uses its own
ranking, and does not know the differences between the graphs of TensorRT and ONNX Runtime. Here the order comes from
the scan (`edgefg.export.quantize.layer_sensitivity`), and the number of kept layers doubles, so that a network of 50
layers is quantised and measured at most eight times.
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
from edgefg.export.quantize.layer_sensitivity import file_logits, scan
from edgefg.export.quantize.quantizer import Quantizer
from edgefg.image_io import read_image
from edgefg.log import get_logger
from edgefg.preprocess import InputSpec, UInt8Array, prepare

_log = get_logger(__name__)
_Built = TypeVar("_Built")
# Images that the layers are ranked on.
_SCANNED = 32
_AT_ONCE = 16


class Kept(NamedTuple):
    """Result of a search."""

    layers: tuple[str, ...]
    """Names of the layers that stay in floating point, the most sensitive first; empty if none has to."""
    drop: float
    """Loss of top-1 against FP32 with them, percentage points; negative for a gain."""


def search(
    build: Callable[[frozenset[str]], _Built],
    measure: Callable[[_Built], float],
    order: Callable[[], Sequence[str]],
    limit: float,
) -> tuple[_Built, Kept]:
    """Keep no layer, then the first one of the order, the first two, four, …, all, until the loss is allowed.

    Args:
        build: quantises all layers but the given ones.
        measure: returns the loss of top-1 against FP32, percentage points.
        order: returns all layers, the most sensitive first. Called once, and only if INT8 throughout loses too much.
        limit: the allowed loss, percentage points.

    Returns:
        The last result of ``build``, and the layers kept for it.

    Raises:
        ExportError: even with all layers in floating point the loss is larger.
    """
    layers: Sequence[str] = ()
    count = 0
    while True:
        built = build(frozenset(layers[:count]))
        found = Kept(tuple(layers[:count]), measure(built))
        _log.info(
            "INT8 with %s layers in floating point loses %.2f points of %g allowed", count or "no", found.drop, limit
        )
        if found.drop <= limit:
            return built, found
        if count == 0:
            layers = order()
        if count == len(layers):  # also if there are none
            raise ExportError(
                f"INT8 loses {found.drop:.2f} points of top-1 on the validation images even with all {count} layers in"
                f" floating point; {limit:g} are allowed. Increase --max-int8-drop, or export fp16 or fp32."
            )
        count = min(max(1, 2 * count), len(layers))


def find_kept(quantizer: Quantizer, samples: Sequence[Sample], spec: InputSpec, limit: float) -> tuple[str, ...]:
    """Return the layers to keep so that top-1 on labelled images drops by no more than ``limit`` points below FP32's.

    Args:
        quantizer: writes INT8 model files of the network; each is measured and deleted.
        samples: labelled images, the validation split. Layers are chosen on them, so accuracy on them is
            then slightly too high.
        spec: the network's input.
        limit: percentage points.

    Raises:
        DataError: an image cannot be read.
        ExportError: the network cannot be quantised, or no number of layers is enough.
    """

    def drop(model: Path) -> float:
        return 100 * (reference - _top1(model, samples, spec, quantizer.batch))

    def order() -> list[str]:
        _log.info("scanning %d layers", len(quantizer.layers))
        inputs = read_calibration(choose_balanced(samples, _SCANNED), spec).inputs
        asked = quantizer.config.keep_layers
        return [row.layer for row in scan(quantizer, inputs).layers if row.layer not in asked]

    with tempfile.TemporaryDirectory(prefix="edgefg-") as scratch:
        reference = _top1(quantizer.source, samples, spec, quantizer.batch)
        _, kept = search(lambda keep: quantizer.write(Path(scratch), keep), drop, order, limit)
    if kept.layers:
        _log.info("kept in floating point: %s", ", ".join(kept.layers))
    return kept.layers


def _top1(model: Path, samples: Sequence[Sample], spec: InputSpec, batch: int) -> float:
    """Return a model file's share of right answers; images are read as they are needed."""
    size = batch or _AT_ONCE

    def data() -> Iterator[UInt8Array]:
        for first in range(0, len(samples), size):
            rows = np.stack([prepare(read_image(path), spec) for path, _ in samples[first : first + size]])
            yield from batches(rows, batch or len(rows))

    found = np.concatenate([logits.argmax(axis=1) for logits in file_logits(model, data())])[: len(samples)]
    return float((found == [label for _, label in samples]).mean())
