"""The methods by name: what `--method` takes, what a checkpoint's header names, what `edgefg methods` lists."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any

import msgspec
from torch import nn

from edgefg.errors import DataError
from edgefg.settings.training import choices_of
from edgefg.training.models.attention import CBAMNet, SENet
from edgefg.training.models.backbone import Triple
from edgefg.training.models.bcnn import BCNN
from edgefg.training.models.network import Network
from edgefg.training.models.partrcnn import PartRCNN
from edgefg.training.models.racnn import RACNN
from edgefg.training.models.wsdan import WSDAN

METHODS: dict[str, type[Network]] = {
    "plain": Network,
    "se": SENet,
    "cbam": CBAMNet,
    "bcnn": BCNN,
    "racnn": RACNN,
    "wsdan": WSDAN,
    "partrcnn": PartRCNN,
}


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
        field = str(exc).partition("`$.")[2].rstrip("`")
        if choices := choices_of(kind, field):
            needed = ", ".join(map(str, choices))
            raise DataError(f"{method} has no {field} {values[field]!r}; needed one of {needed}") from exc
        raise DataError(f"an option of {method} is wrong: {exc}; it has: {known} (see edgefg methods)") from exc


def build(method: str, backbone: nn.Module, mean: Triple, std: Triple, options: Mapping[str, Any]) -> Network:
    """Build the method's network around a backbone. Raises `DataError` as `options_of`."""
    return METHODS[method](backbone, mean, std, options_of(method, options))


class Described(msgspec.Struct, frozen=True, kw_only=True):
    """A method, for people."""

    name: str
    summary: str
    paper: str
    single_pass: bool
    """Whether it exports to ONNX and OpenVINO by itself."""
    options: dict[str, tuple[Any, str]]
    """Option → the paper's default, and one line of help."""
    advice: str = ""
    """What the paper trains with, where the defaults are others."""

    def render(self) -> str:
        """Return a few lines of text."""
        kind = "exports by itself" if self.single_pass else "distil it into a student to export"
        lines = [f"{self.name:10} {self.summary} ({self.paper}; {kind})"]
        for name, (default, text) in self.options.items():
            value = f"{default:.4g}" if isinstance(default, float) else default
            lines.append(f"    {f'-o {name}={value}':24} {text}")
        if self.advice:
            lines.append(f"    {self.advice}")
        return "\n".join(lines)


def describe(method: str) -> Described:
    """Describe a method and its options."""
    network = METHODS[method]
    defaults = network.Options()
    types = typing.get_type_hints(network.Options, include_extras=True)

    def help_of(field: str) -> str:
        choices = "|".join(map(str, choices_of(network.Options, field)))
        text = " ".join(m.description or "" for m in types[field].__metadata__)
        return f"{choices}: {text}" if choices else text

    options = {field: (getattr(defaults, field), help_of(field)) for field in network.Options.__struct_fields__}
    return Described(
        name=method,
        summary=network.summary,
        paper=network.paper,
        single_pass=network.single_pass,
        options=options,
        advice=network.advice,
    )
