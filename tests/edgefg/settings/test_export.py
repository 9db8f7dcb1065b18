"""Settings of an export."""

from __future__ import annotations

import pytest

from edgefg.errors import DataError
from edgefg.settings.export import ExportConfig
from edgefg.settings.options import options_of, with_options


def test_every_field_has_a_description_for_the_command_line() -> None:
    options = options_of(ExportConfig)
    assert tuple(options) == ExportConfig.__struct_fields__
    assert all(option.help for option in options.values())


def test_a_batch_size_is_not_negative() -> None:
    assert with_options(ExportConfig(), batch=0).batch == 0
    with pytest.raises(DataError, match="--batch -1 is out of range"):
        with_options(ExportConfig(), batch=-1)
