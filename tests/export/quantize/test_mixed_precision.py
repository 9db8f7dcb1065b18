"""The search for the layers that stay in floating point."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgefg.data.split import Sample
from edgefg.errors import ExportError
from edgefg.export.quantize.mixed_precision import find_kept, search
from edgefg.export.targets import TARGETS
from edgefg.preprocess import UInt8Array
from tests.export.quantize.conftest import HURT, SPEC
from tests.export.quantizing import quantizer_of


@pytest.mark.parametrize("to", list(TARGETS))
def test_the_layer_that_hurts_is_kept(
    spoilt: Path, inputs: UInt8Array, samples: tuple[Sample, ...], to: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "edgefg")
    quantizer = quantizer_of(to, spoilt, inputs)
    assert find_kept(quantizer, samples, SPEC, 7.0) == (HURT,)
    assert caplog.messages[0].startswith("INT8 with no layers in floating point loses ")
    assert caplog.messages[-1] == f"kept in floating point: {HURT}"
    assert find_kept(quantizer, samples, SPEC, 100.0) == ()
    assert find_kept(quantizer_of(to, spoilt, inputs, keep_layers=(HURT,)), samples, SPEC, 7.0) == ()


def test_the_search_doubles_and_stops() -> None:
    tried: list[frozenset[str]] = []
    layers = [f"layer {i}" for i in range(13)]

    def build(keep: frozenset[str]) -> int:
        tried.append(keep)
        return len(keep)

    built, found = search(build, lambda kept: 9.0 - kept, lambda: layers, 2.5)
    assert [len(keep) for keep in tried] == [0, 1, 2, 4, 8]
    assert (built, found.layers, found.drop) == (8, tuple(layers[:8]), 1.0)
    assert tried[-1] == set(layers[:8])


def test_the_scan_is_spared_where_nothing_has_to_be_kept() -> None:
    def never() -> list[str]:
        raise AssertionError

    assert search(len, lambda kept: 0.5, never, 0.5)[1].layers == ()


def test_where_all_layers_are_not_enough(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "edgefg")
    with pytest.raises(ExportError, match=r"loses 3\.00 points of top-1 .* even with all 5 layers .*; 1 are allowed"):
        search(len, lambda kept: 3.0, lambda: list("abcde"), 1.0)
    assert [line.split()[2] for line in caplog.messages] == ["no", "1", "2", "4", "5"]


def test_a_loss_that_is_no_number_is_never_allowed() -> None:
    with pytest.raises(ExportError, match="loses nan points"):
        search(len, lambda kept: float("nan"), lambda: ["a"], 1.0)


def test_a_network_without_a_layer_to_keep_ends_the_search() -> None:
    with pytest.raises(ExportError, match="even with all 0 layers"):
        search(lambda keep: keep, lambda _: 5.0, list, 1.0)
