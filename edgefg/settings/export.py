"""Settings of an export that hold for every target and precision."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta


class ExportConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """How an artifact is made and proven."""

    batch: Annotated[int, Meta(ge=0, description="fixed batch size of the network; 0 leaves it free")] = 1
    seed: Annotated[int, Meta(description="seed of the choice of calibration and golden images")] = 0
    generated_golden: Annotated[
        bool, Meta(description="make the golden set from generated frames, so that the artifact holds no photograph")
    ] = False
    fit_temperature: Annotated[
        bool, Meta(description="fit the temperature of the probabilities on validation images; else it stays 1")
    ] = True
