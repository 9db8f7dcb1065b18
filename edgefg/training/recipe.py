"""The settings of one training stage, and where a run keeps its files."""

from __future__ import annotations

from typing import Annotated

import msgspec

_Positive = Annotated[float, msgspec.Meta(gt=0)]
_Count = Annotated[int, msgspec.Meta(ge=1)]


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a network is trained; a run resumes only under an equal recipe."""

    epochs: _Count
    image_size: Annotated[int, msgspec.Meta(ge=16, le=4096)]
    """Height and width of the network input, pixels."""
    batch_size: Annotated[int, msgspec.Meta(ge=2)] = 32
    """At least 2, since batch normalisation cannot take one image."""
    lr: _Positive = 1e-3
    """Peak learning rate of AdamW (Loshchilov & Hutter 2019), reached after the warm-up, then a half cosine to zero."""
    head_lr_ratio: _Positive = 5.0
    """Learning rate of a new head relative to the rest."""
    weight_decay: Annotated[float, msgspec.Meta(ge=0)] = 0.02
    label_smoothing: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.1
    """Szegedy et al. 2016."""
    warmup: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.1
    """Share of the steps over which the learning rate rises linearly."""
    clip_norm: _Positive = 5.0
    """Greatest L2 norm of the gradient."""
    seed: int = 0


class Hardware(msgspec.Struct, frozen=True, kw_only=True):
    """Where a stage runs. Rounding depends on it, and the order of random numbers on ``workers`` and ``devices``."""

    accelerator: str = "auto"
    """Lightning Fabric's name: ``auto``, ``cpu``, ``cuda``, ``mps``."""
    devices: _Count = 1
    precision: str = "auto"
    """``auto``: bf16 or fp16 mixed on CUDA, 32-bit elsewhere; or Lightning Fabric's name."""
    workers: Annotated[int, msgspec.Meta(ge=0)] = 1
    """Processes that decode and augment."""
