"""The settings of one training stage, and where a run keeps its files."""

from __future__ import annotations

from typing import Annotated, Literal

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
    """Peak learning rate, reached after the warm-up, then a half cosine to zero."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW (Loshchilov & Hutter 2019), or SGD with Nesterov momentum 0.9."""
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

    layer_decay: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    """Factor of the learning rate from block to block, towards the input (Howard & Ruder 2018)."""
    freeze_epochs: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Epochs at the start in which only what starts untrained learns."""
    ema: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    """Decay a step of the exponential moving average of the weights, which then is the result; 0 is none."""
    patience: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Stop after this many epochs without a better top-1 on ``val``, and keep the best; 0 runs all epochs."""
    mix: Literal["none", "mixup", "cutmix", "snapmix"] = "none"
    """Mixing of image pairs: Zhang et al. 2018, Yun et al. 2019, Huang et al. 2021."""
    mix_alpha: _Positive = 1.0
    """Of the Beta(α, α) that draws the mixed share."""
    mix_share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    """Probability that a batch is mixed."""
    randaugment: Annotated[int, msgspec.Meta(ge=0, le=30)] = 0
    """Magnitude of two RandAugment operations an image (Cubuk et al. 2020); 0 is none."""
    rotation: Annotated[float, msgspec.Meta(ge=0, le=180)] = 0.0
    """Greatest rotation, degrees."""
    center_weight: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """Weight of the center loss (Wen et al. 2016; theirs is 0.003); 0 is none."""
    triplet_weight: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """Weight of the triplet loss with batch-hard mining (Hermans et al. 2017); 0 is none."""
    sampler: Literal["shuffle", "balanced", "pk"] = "shuffle"
    """Order: every image once; classes drawn alike often; or P classes × K images in each batch."""
    per_class: Annotated[int, msgspec.Meta(ge=2)] = 4
    """K of the ``pk`` sampler; P is the batch size divided by K."""


class Hardware(msgspec.Struct, frozen=True, kw_only=True):
    """Where a stage runs. Rounding depends on it, and the order of random numbers on ``workers`` and ``devices``."""

    accelerator: str = "auto"
    """Lightning Fabric's name: ``auto``, ``cpu``, ``cuda``, ``mps``."""
    devices: _Count = 1
    precision: str = "auto"
    """``auto``: bf16 or fp16 mixed on CUDA, 32-bit elsewhere; or Lightning Fabric's name."""
    workers: Annotated[int, msgspec.Meta(ge=0)] = 1
    """Processes that decode and augment."""
