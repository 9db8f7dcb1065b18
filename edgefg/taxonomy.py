"""Taxonomy: coarser levels above the classes, genus and family for instance."""

from __future__ import annotations

import msgspec


class TaxonomyLevel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """One coarser level above the classes: for every label the name of its group."""

    name: str
    groups: tuple[str, ...]
    """As long as the labels, in their order."""
