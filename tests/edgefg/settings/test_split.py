"""Settings of a split: ranges, and the form that checkpoints keep."""

from __future__ import annotations

import msgspec
import pytest

from edgefg.settings.split import SplitSpec


def test_it_survives_a_checkpoint_header() -> None:
    spec = SplitSpec(seed=3, group=r"(\w+)/", val=0.2, test=0.1)
    assert msgspec.json.decode(msgspec.json.encode(spec), type=SplitSpec) == spec


@pytest.mark.parametrize("text", ['{"val": 0.5}', '{"test": 0}', '{"val": -0.1}', '{"vall": 0.1}'])
def test_wrong_settings_are_refused(text: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(text, type=SplitSpec)
