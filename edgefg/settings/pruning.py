"""Settings of structured pruning."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from edgefg.errors import DataError

Cost = Literal["macs", "params", "latency"]
"""A cost of a network that pruning reduces: multiply-accumulates, parameters, or measured latency."""


class PruningConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Which channels are removed, and how many."""

    macs: Annotated[
        float | None,
        Meta(
            description="Share of the multiply-accumulates to keep, between 0 and 1. Default: 0.7, unless --params or"
            " --latency is given."
        ),
    ] = None
    params: Annotated[float | None, Meta(description="Share of the parameters to keep, instead of --macs.")] = None
    latency: Annotated[
        float | None,
        Meta(
            description="Share of the latency to keep, instead of --macs. It is measured on this machine: ONNX Runtime"
            " runs the pruned and the original network in turn.",
        ),
    ] = None
    latency_precision: Annotated[
        Literal["fp32", "int8"], Meta(description="Precision of the networks whose latency is measured.")
    ] = "fp32"
    importance: Annotated[
        Literal["taylor", "magnitude", "fpgm", "bn-scale"],
        Meta(
            description="Importance of a channel: first-order change of the loss (Molchanov et al. 2019), L2 norm of"
            " its weights (Li et al. 2017), distance from the other filters of its layer (He et al. 2019), or scale of"
            " its batch norm (Liu et al. 2017)."
        ),
    ] = "taylor"
    isomorphic: Annotated[
        bool,
        Meta(description="Rank channels only among layers of equal structure (Fang et al. 2024), not among all."),
    ] = False
    uniform: Annotated[
        bool, Meta(description="Remove the same share of every layer instead of ranking globally; a baseline.")
    ] = False
    round_to: Annotated[
        int,
        Meta(
            ge=1,
            description="Keep multiples of this many channels. 16 suits INT8 kernels, 8 suits floating point.",
        ),
    ] = 16
    max_ratio: Annotated[
        float,
        Meta(
            gt=0,
            lt=1,
            description="Largest share of its channels that a layer may lose. The channels to keep are rounded up to a"
            " multiple of --round-to.",
        ),
    ] = 0.25
    rounds: Annotated[
        int, Meta(ge=1, description="Prune in this many rounds of equal size, with fine-tuning after each.")
    ] = 1
    round_epochs: Annotated[
        int,
        Meta(ge=1, description="Epochs of fine-tuning after each round but the last, which is trained for --epochs."),
    ] = 1

    def target(self) -> tuple[Cost, float]:
        """Return the cost to reduce, and the share of it to keep.

        Raises:
            DataError: several targets or rankings were given, or a share is out of range.
        """
        costs: tuple[Cost, ...] = ("macs", "params", "latency")
        given = [(cost, share) for cost in costs if (share := getattr(self, cost)) is not None]
        if len(given) > 1:
            named = " and ".join(f"--{cost} {share:g}" for cost, share in given)
            raise DataError(f"{named} exclude each other. Give one of them")
        if self.isomorphic and self.uniform:
            raise DataError("--isomorphic and --uniform exclude each other. Give one of them")
        for cost, share in given:
            if not 0 < share < 1:
                raise DataError(f"--{cost} {share:g} is out of range. Give a share between 0 and 1")
        return given[0] if given else ("macs", 0.7)
