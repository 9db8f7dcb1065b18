"""Limits of the gate: their ranges, and that a manifest states all of them."""

from __future__ import annotations

import msgspec
import pytest

from edgefg.errors import DataError
from edgefg.settings.gate import Gate
from edgefg.settings.options import with_options


def test_a_manifest_states_every_limit() -> None:
    """A later edgefg with other defaults must not change what an artifact passed."""
    assert msgspec.json.decode(msgspec.json.encode(Gate())).keys() == set(Gate.__struct_fields__)


@pytest.mark.parametrize(
    ("limit", "value"),
    [("max_drop", 101.0), ("max_class_drop", -1.0), ("max_flips", 100.5), ("min_agreement", 95.0)],
)
def test_a_limit_out_of_range(limit: str, value: float) -> None:
    with pytest.raises(DataError, match=rf"--{limit.replace('_', '-')} {value} is out of range"):
        with_options(Gate(), **{limit: value})


def test_a_gain_may_be_required() -> None:
    assert with_options(Gate(), max_drop=-0.5).max_drop == -0.5
