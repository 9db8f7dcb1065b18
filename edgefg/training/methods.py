"""The methods by name: what `--method` takes, what a checkpoint's header names, what `edgefg methods` lists."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from torch import nn

from edgefg.errors import DataError
from edgefg.training.models.backbone import Triple
from edgefg.training.models.network import Network

METHODS: dict[str, type[Network]] = {"plain": Network}


def options_of(method: str, values: Mapping[str, Any]) -> msgspec.Struct:
    """Check a method's options; the paper's defaults stand for what is not given.

    Args:
        method: one of `METHODS`.
        values: option → value; text is converted.

    Raises:
        DataError: there is no such method or option, or a value is out of range.
    """
    if method not in METHODS:
        raise DataError(f"there is no method {method!r}; needed one of {', '.join(METHODS)}")
    kind = METHODS[method].Options
    try:
        return msgspec.convert(dict(values), kind, strict=False)
    except msgspec.ValidationError as exc:
        known = ", ".join(kind.__struct_fields__) or "none"
        raise DataError(f"an option of {method} is wrong: {exc}; it has: {known} (see edgefg methods)") from exc


def build(method: str, backbone: nn.Module, mean: Triple, std: Triple, options: Mapping[str, Any]) -> Network:
    """Build the method's network around a backbone. Raises `DataError` as `options_of`."""
    return METHODS[method](backbone, mean, std, options_of(method, options))
