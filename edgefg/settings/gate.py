"""Limits of the acceptance gate: how much worse than its FP32 parent an artifact may be."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta


class Gate(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How much worse than its FP32 parent an artifact may be on the same images.

    `edgefg.evaluation.gate` has the rules.
    Encoded with all fields: a manifest's limits do not change with the defaults of a later edgefg.
    """

    max_drop: Annotated[
        float,
        Meta(
            ge=-100,
            le=100,
            description="Largest loss of top-1 against the parent, in percentage points. One standard error is added,"
            " so that a few hundred images do not fail a sound artifact by chance.",
        ),
    ] = 1.0
    max_class_drop: Annotated[
        float,
        Meta(
            ge=0,
            le=100,
            description="Largest loss of recall of any class, in percentage points. A loss of so few images that it"
            " may be chance does not fail a class, and a single image never does.",
        ),
    ] = 10.0
    max_flips: Annotated[
        float,
        Meta(
            ge=0,
            le=100,
            description="Largest share of images that the parent classifies correctly and the artifact does not, in"
            " percent. One standard error is added. Images that only the artifact classifies correctly do not make"
            " up for them.",
        ),
    ] = 5.0
    min_agreement: Annotated[
        float, Meta(ge=0, le=1, description="Smallest share of images on which both predict the same class.")
    ] = 0.0
