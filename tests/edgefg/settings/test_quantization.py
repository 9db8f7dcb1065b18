"""Settings of quantisation: limits, names, and what counts as changed."""

from __future__ import annotations

import typing

import msgspec
import pytest

from edgefg.errors import DataError
from edgefg.settings.options import options_of, with_options
from edgefg.settings.quantization import Calibrator, QuantizationConfig

DEFAULT = QuantizationConfig()


def test_every_field_has_a_description_for_the_command_line() -> None:
    options = options_of(QuantizationConfig)
    assert tuple(options) == QuantizationConfig.__struct_fields__
    assert all(option.help for option in options.values())
    assert options["calibrator"].choices == typing.get_args(Calibrator)


def test_changed_fields() -> None:
    assert DEFAULT.changed() == set()
    assert QuantizationConfig(reduce_range=False, keep_layers=("a",)).changed() == {"reduce_range", "keep_layers"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_samples": 0}, "--num-samples 0 is out of range"),
        ({"max_int8_drop": -0.5}, "--max-int8-drop -0.5 is out of range"),
        ({"max_int8_drop": float("nan")}, "--max-int8-drop nan is out of range"),
        ({"calibrator": "guess"}, "--calibrator 'guess' is not a choice. Use one of minmax, percentile, mse, entropy"),
    ],
)
def test_values_out_of_range(values: dict[str, typing.Any], message: str) -> None:
    for settings, options in ((QuantizationConfig(**values), {}), (DEFAULT, values)):
        with pytest.raises(DataError) as caught:
            with_options(settings, **options)
        assert message in str(caught.value)


def test_a_record_keeps_every_value_and_is_read_by_earlier_versions() -> None:
    config = QuantizationConfig(calibrator="mse", keep_layers=("a", "b"))
    record = msgspec.json.decode(msgspec.json.encode(config))
    assert set(record) == set(QuantizationConfig.__struct_fields__), "a later default must not change an old record"
    assert msgspec.convert(record | {"an option of a later version": 1}, QuantizationConfig) == config
