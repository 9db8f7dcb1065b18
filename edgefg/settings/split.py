"""Settings for splitting images into training, validation and test images."""

from __future__ import annotations

from typing import Annotated

import msgspec


class SplitSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Split of data without fixed splits. Checkpoints store it, so that every stage splits the data identically."""

    seed: int = 0
    group: str | None = None
    """Regular expression matched against image paths: images with the same first group, or else the same match, form a
    group (camera, patient, lot). A group stays in one split. None: every image is its own group.
    """
    val: Annotated[float, msgspec.Meta(gt=0, lt=0.5)] = 0.15
    test: Annotated[float, msgspec.Meta(gt=0, lt=0.5)] = 0.15
