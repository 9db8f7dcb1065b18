"""Settings of a training: schedule, augmentation, fine-tuning and metric learning."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

_MIN_SIZE = 16


class Schedule(msgspec.Struct, frozen=True, kw_only=True):
    """How long and how fast a network learns."""

    epochs: Annotated[int, Meta(ge=1, description="Passes over the training images.")] = 10
    batch_size: Annotated[int, Meta(ge=2, description="Images per step.")] = 32
    lr: Annotated[
        float, Meta(gt=0, description="Peak learning rate, reached after the warm-up. It then falls to 0 (cosine).")
    ] = 1e-3
    warmup: Annotated[
        float, Meta(ge=0, lt=1, description="Share of all steps over which the learning rate rises to its peak.")
    ] = 0.1
    optimizer: Annotated[
        Literal["adamw", "sgd"],
        Meta(description="AdamW (Loshchilov & Hutter 2019), or SGD with Nesterov momentum 0.9."),
    ] = "adamw"
    weight_decay: Annotated[
        float, Meta(ge=0, description="Weight decay. Biases and normalisation weights are exempt.")
    ] = 0.02
    clip_norm: Annotated[float, Meta(gt=0, description="Clip gradients to this L2 norm.")] = 5.0
    label_smoothing: Annotated[float, Meta(ge=0, lt=1, description="Label smoothing (Szegedy et al. 2016).")] = 0.1
    ema: Annotated[
        float,
        Meta(ge=0, lt=1, description="Decay per step of an exponential moving average of the weights. 0: no average."),
    ] = 0.0
    val_every: Annotated[
        int, Meta(ge=1, description="Measure validation accuracy every n epochs, and after the last one.")
    ] = 1
    patience: Annotated[
        int,
        Meta(
            ge=0,
            description="Stop after this many epochs without a better validation accuracy, and keep the best weights."
            " 0: never stop early.",
        ),
    ] = 0
    seed: Annotated[
        int, Meta(description="Seed of the new layers' weights, the order of the images and the augmentation.")
    ] = 0


class Augmentation(msgspec.Struct, frozen=True, kw_only=True):
    """How training images are cropped, changed and mixed."""

    train_size: Annotated[
        int,
        Meta(
            ge=0,
            le=4096,
            description="Size of training crops in pixels. About 0.8 of the image size makes up for crops that enlarge"
            " things (Touvron et al. 2019). 0: the image size.",
        ),
    ] = 0
    start_size: Annotated[
        int,
        Meta(
            ge=0,
            le=4096,
            description="Size of training crops in the first epoch. It grows to the full size over the first three"
            " quarters of the epochs (progressive learning, Tan & Le 2021). 0: constant size.",
        ),
    ] = 0
    min_area: Annotated[
        float, Meta(gt=0, le=1, description="Smallest share of an image's area that a training crop covers.")
    ] = 0.4
    color: Annotated[
        float, Meta(ge=0, lt=1, description="Strength of the jitter of brightness, contrast and saturation. 0: none.")
    ] = 0.25
    hue: Annotated[
        float, Meta(ge=0, le=0.5, description="Strength of the hue jitter, as a share of the colour circle. 0: none.")
    ] = 0.0
    flip: Annotated[
        Literal["none", "horizontal", "both"],
        Meta(
            description="Mirror half of the images. Use none where left and right differ, and both (horizontally and"
            " vertically) where no direction is up."
        ),
    ] = "horizontal"
    rotation: Annotated[float, Meta(ge=0, le=180, description="Rotate by up to this many degrees.")] = 0.0
    randaugment: Annotated[
        int, Meta(ge=0, le=30, description="Magnitude of two RandAugment operations (Cubuk et al. 2020). 0: none.")
    ] = 0
    mix: Annotated[
        Literal["none", "mixup", "cutmix", "snapmix"],
        Meta(
            description="Mix pairs of images: MixUp (Zhang et al. 2018), CutMix (Yun et al. 2019) or SnapMix (Huang et"
            " al. 2021)."
        ),
    ] = "none"
    mix_alpha: Annotated[
        float,
        Meta(gt=0, description="α of the Beta(α, α) distribution of the mixing ratio. The SnapMix paper uses 5."),
    ] = 1.0
    mix_share: Annotated[float, Meta(gt=0, le=1, description="Share of the batches that are mixed.")] = 1.0
    crop_epochs: Annotated[
        int,
        Meta(
            ge=0,
            description="Repeat the same training crops after this many epochs, so that a teacher cache holds all of"
            " them. 0: new crops in every epoch.",
        ),
    ] = 0

    def __post_init__(self) -> None:
        if 0 < self.train_size < _MIN_SIZE:
            raise ValueError(f"--train-size {self.train_size} is too small. Use 0, or at least {_MIN_SIZE}")


class FineTuning(msgspec.Struct, frozen=True, kw_only=True):
    """How pretrained weights are treated beside new layers."""

    head_lr_ratio: Annotated[
        float, Meta(gt=0, description="Learning rate of new layers, relative to that of pretrained ones.")
    ] = 5.0
    layer_decay: Annotated[
        float,
        Meta(
            gt=0,
            le=1,
            description="Factor of the learning rate from each block to the one before it (discriminative fine-tuning,"
            " Howard & Ruder 2018). 1: one rate for all.",
        ),
    ] = 1.0
    freeze_epochs: Annotated[int, Meta(ge=0, description="Train only new layers in this many first epochs.")] = 0
    unfreeze_epochs: Annotated[
        int,
        Meta(
            ge=0,
            description="Then unfreeze the backbone gradually over this many epochs, last block first (ULMFiT, Howard"
            " & Ruder 2018). 0: all at once.",
        ),
    ] = 0


class MetricLearning(msgspec.Struct, frozen=True, kw_only=True):
    """Losses on embeddings, and the sampling of classes that they need."""

    center_weight: Annotated[
        float, Meta(ge=0, description="Weight of the center loss. Wen et al. 2016 use 0.003. 0: no center loss.")
    ] = 0.0
    triplet_weight: Annotated[
        float, Meta(ge=0, description="Weight of the triplet loss (Hermans et al. 2017). 0: no triplet loss.")
    ] = 0.0
    mining: Annotated[
        Literal["hard", "semihard"],
        Meta(
            description="Triplets of the triplet loss: the hardest one of each anchor, or all whose negative is farther"
            " away than the positive but within the margin."
        ),
    ] = "hard"
    sampler: Annotated[
        Literal["shuffle", "balanced", "pk"],
        Meta(
            description="Order of the images: each image once per epoch, all classes equally often, or batches of P"
            " classes × K images."
        ),
    ] = "shuffle"
    per_class: Annotated[int, Meta(ge=2, description="K, the images per class in a batch of the pk sampler.")] = 4


class TrainingConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How a network is trained. A run resumes only with equal settings.

    Stage records keep settings with all their values: later defaults do not change what an earlier run was.
    """

    image_size: Annotated[
        int, Meta(ge=_MIN_SIZE, le=4096, description="Height and width of the network's input in pixels.")
    ] = 224
    schedule: Schedule = Schedule()
    augmentation: Augmentation = Augmentation()
    fine_tuning: FineTuning = FineTuning()
    metric_learning: MetricLearning = MetricLearning()

    def crop_seed(self, epoch: int) -> int:
        """Return the seed of the order and the augmentation of an epoch (counted from 0)."""
        repeat = self.augmentation.crop_epochs
        return self.schedule.seed * 100_003 + (epoch % repeat if repeat else epoch)

    def size_at(self, epoch: int) -> int:
        """Return the size of the training crops in an epoch (counted from 0), in pixels.

        While the size grows it is a multiple of 16.
        """
        full, start = self.augmentation.train_size or self.image_size, self.augmentation.start_size
        share = min(1.0, epoch / (0.75 * self.schedule.epochs))
        if not start or share >= 1:
            return full
        return max(_MIN_SIZE, round((start + (full - start) * share) / 16) * 16)
