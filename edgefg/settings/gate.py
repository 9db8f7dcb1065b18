"""Limits of the acceptance gate: how much worse than its FP32 parent an artifact may be."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta


class Gate(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How much worse than its FP32 parent an artifact may be on the same images.

    `edgefg.evaluation.gate` has the rules.
    Encoded whole: a manifest's limits stay what they were where a later edgefg has other defaults.
    """

    max_drop: Annotated[
        float,
        Meta(
            ge=-100,
            le=100,
            description="greatest loss of top-1 against the parent, percentage points; one standard error more is"
            " allowed for, so that a few hundred images fail no sound artifact by chance",
        ),
    ] = 1.0
    max_class_drop: Annotated[
        float,
        Meta(
            ge=0,
            le=100,
            description="greatest loss of a class's recall, percentage points; so few images that chance may have"
            " taken them fail no class, a single one never does",
        ),
    ] = 10.0
    max_flips: Annotated[
        float,
        Meta(
            ge=0,
            le=100,
            description="most images that the parent has right and the artifact takes for another class, percent of"
            " all; one standard error more is allowed for; what others gain does not make up for them",
        ),
    ] = 5.0
    min_agreement: Annotated[
        float, Meta(ge=0, le=1, description="least share of images on which both name the same class, right or wrong")
    ] = 0.0
