"""Taxonomy levels as manifests hold them."""

from __future__ import annotations

import msgspec
import pytest

from edgefg.taxonomy import TaxonomyLevel


def test_it_survives_json_and_refuses_what_it_does_not_know() -> None:
    level = TaxonomyLevel(name="genus", groups=("Quercus", "Ulmus"))
    assert msgspec.json.decode(msgspec.json.encode(level), type=TaxonomyLevel) == level
    with pytest.raises(msgspec.ValidationError, match="unknown field `rank`"):
        msgspec.json.decode(b'{"name": "genus", "groups": [], "rank": 1}', type=TaxonomyLevel)
