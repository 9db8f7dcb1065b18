"""Settings of the split into training, validation and test images."""

from __future__ import annotations

from typing import Annotated

import msgspec


class SplitSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How data without splits of their own are split; stored in checkpoints, so that every stage splits alike."""

    seed: int = 0
    group: str | None = None
    """Regular expression; its first group (or whole match) in an image's path is its group: camera, patient, lot.

    Images of one group never part. None: every image is a group of its own.
    """
    val: Annotated[float, msgspec.Meta(gt=0, lt=0.5)] = 0.15
    test: Annotated[float, msgspec.Meta(gt=0, lt=0.5)] = 0.15
