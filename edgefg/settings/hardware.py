"""Settings of the hardware that a stage runs on."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta


class Hardware(msgspec.Struct, frozen=True, kw_only=True):
    """Where a stage runs. It is not recorded: a run may resume on other hardware.

    The result depends on it all the same: arithmetic rounds differently, and the order of random numbers follows from
    ``workers`` and ``devices``.
    """

    accelerator: Annotated[str, Meta(description="Lightning Fabric's accelerator: auto, cpu, cuda or mps.")] = "auto"
    devices: Annotated[int, Meta(ge=1, description="Number of devices.")] = 1
    precision: Annotated[
        str,
        Meta(
            description="auto, or one of Lightning Fabric's precisions, for instance bf16-mixed. auto is mixed bf16 or"
            " fp16 on CUDA, and 32 bit elsewhere."
        ),
    ] = "auto"
    workers: Annotated[int, Meta(ge=0, description="Processes that decode and augment images.")] = 1
