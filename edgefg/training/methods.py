"""The methods by name, as in `--method`, in checkpoint headers and in `edgefg methods`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from torch import nn

from edgefg.errors import DataError
from edgefg.settings.options import options_of
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


def method_options(method: str, values: Mapping[str, Any]) -> msgspec.Struct:
    """Check the options of a method; options that are not given take the paper's values.

    Args:
        method: one of `METHODS`.
        values: option → value. Text is converted.

    Raises:
        DataError: there is no such method or option, or a value is out of range.
    """
    if method not in METHODS:
        raise DataError(f"there is no method {method!r}. Use one of {', '.join(METHODS)}")
    kind = METHODS[method].Options
    try:
        return msgspec.convert(dict(values), kind, strict=False)
    except msgspec.ValidationError as exc:
        known = options_of(kind)
        option = known.get(str(exc).partition("`$.")[2].rstrip("`"))
        if option is not None and option.choices:
            allowed = ", ".join(map(str, option.choices))
            raise DataError(f"{method} has no {option.name} {values[option.name]!r}. Use one of {allowed}") from exc
        names = ", ".join(known) or "none"
        raise DataError(f"invalid option of {method}: {exc}. Its options are: {names} (see edgefg methods)") from exc


def build(method: str, backbone: nn.Module, mean: Triple, std: Triple, options: Mapping[str, Any]) -> Network:
    """Build the network of a method around a backbone. Raises `DataError` as `method_options`."""
    return METHODS[method](backbone, mean, std, method_options(method, options))


class MethodDescription(msgspec.Struct, frozen=True, kw_only=True):
    """Description of a method for `edgefg methods`."""

    name: str
    summary: str
    paper: str
    single_pass: bool
    """Whether it can be exported. Other methods are distilled into a student first."""
    options: dict[str, tuple[Any, str]]
    """Option → the paper's value, and one line of help."""
    advice: str = ""
    """Training settings of the paper that differ from the defaults."""

    def render(self) -> str:
        """Return a few lines of text."""
        kind = "can be exported" if self.single_pass else "distil it into a student to export it"
        lines = [f"{self.name:10} {self.summary} ({self.paper}; {kind})"]
        for name, (default, text) in self.options.items():
            value = f"{default:.4g}" if isinstance(default, float) else default
            lines.append(f"    {f'-o {name}={value}':24} {text}")
        if self.advice:
            lines.append(f"    {self.advice}")
        return "\n".join(lines)


def describe(method: str) -> MethodDescription:
    """Describe a method and its options."""
    network = METHODS[method]
    defaults = network.Options()
    options = {}
    for option in options_of(network.Options).values():
        choices = "|".join(map(str, option.choices))
        text = f"{choices}: {option.help}" if choices else option.help
        options[option.name] = (option.value_in(defaults), text)
    return MethodDescription(
        name=method,
        summary=network.summary,
        paper=network.paper,
        single_pass=network.single_pass,
        options=options,
        advice=network.advice,
    )
