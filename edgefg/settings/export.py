"""Settings of an export that hold for every target and precision."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta


class ExportConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How an artifact is made and proven."""

    batch: Annotated[int, Meta(ge=0, description="Batch size of the network. 0: dynamic.")] = 1
    seed: Annotated[int, Meta(description="Seed of the choice of calibration and golden images.")] = 0
    generated_golden: Annotated[
        bool, Meta(description="Use generated frames in the golden set, so that the artifact contains no photograph.")
    ] = False
    fit_temperature: Annotated[
        bool, Meta(description="Fit the temperature of the probabilities on validation images. Otherwise it is 1.")
    ] = True
