"""The settings of a training stage, as plain data: the command line reads its options and their help from here.

They live in the core because they need nothing but msgspec; what trains is in `edgefg.training`.
"""

from __future__ import annotations

import typing
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from edgefg.errors import DataError

_LEAST_SIZE = 16
Measure = Literal["macs", "params", "latency"]
"""What a pruned network is smaller in: multiply-accumulates, parameters, or measured time."""


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """How a network is trained; a run resumes only under an equal recipe."""

    epochs: Annotated[int, Meta(ge=1, description="passes over the training images")]
    image_size: Annotated[
        int, Meta(ge=_LEAST_SIZE, le=4096, description="height and width of the network input in pixels")
    ]
    train_size: Annotated[
        int,
        Meta(
            ge=0,
            le=4096,
            description="network input in training, where crops show things larger than at test (Touvron et al. 2019:"
            " about 0.8 of the image size); 0: the image size",
        ),
    ] = 0
    start_size: Annotated[
        int,
        Meta(
            ge=0,
            le=4096,
            description="network input of the first epoch, which grows over three quarters of the epochs (Tan & Le"
            " 2021); 0: no growth",
        ),
    ] = 0
    batch_size: Annotated[int, Meta(ge=2, description="images in a step")] = 32
    lr: Annotated[
        float, Meta(gt=0, description="peak learning rate, reached after the warm-up, then half a cosine to zero")
    ] = 1e-3
    optimizer: Annotated[
        Literal["adamw", "sgd"],
        Meta(description="adamw (Loshchilov & Hutter 2019), or sgd with Nesterov momentum 0.9"),
    ] = "adamw"
    head_lr_ratio: Annotated[
        float, Meta(gt=0, description="learning rate of what starts untrained, relative to the rest")
    ] = 5.0
    weight_decay: Annotated[float, Meta(ge=0, description="decay of all weights but norms and biases")] = 0.02
    label_smoothing: Annotated[float, Meta(ge=0, lt=1, description="label smoothing (Szegedy et al. 2016)")] = 0.1
    warmup: Annotated[float, Meta(ge=0, lt=1, description="share of the steps over which the learning rate rises")] = (
        0.1
    )
    clip_norm: Annotated[float, Meta(gt=0, description="greatest L2 norm of the gradient")] = 5.0
    seed: Annotated[int, Meta(description="seed of what starts untrained, the order and the augmentation")] = 0
    val_every: Annotated[int, Meta(ge=1, description="score val after every n-th epoch; after the last one always")] = 1
    patience: Annotated[
        int,
        Meta(
            ge=0,
            description="stop after this many epochs of the classifiers without a better top-1 on val, and keep the"
            " best; 0: never",
        ),
    ] = 0
    layer_decay: Annotated[
        float,
        Meta(
            gt=0,
            le=1,
            description="factor of the learning rate from block to block towards the input (Howard & Ruder 2018)",
        ),
    ] = 1.0
    freeze_epochs: Annotated[
        int, Meta(ge=0, description="epochs at the start in which only what starts untrained learns")
    ] = 0
    thaw_epochs: Annotated[
        int,
        Meta(
            ge=0,
            description="epochs after those over which the rest begins to learn, block by block from the last to the"
            " first (Howard & Ruder 2018); 0: all at once",
        ),
    ] = 0
    ema: Annotated[
        float, Meta(ge=0, lt=1, description="decay a step of the moving average of the weights; 0: none")
    ] = 0.0
    mix: Annotated[
        Literal["none", "mixup", "cutmix", "snapmix"],
        Meta(description="mix pairs of images (Zhang et al. 2018, Yun et al. 2019, Huang et al. 2021)"),
    ] = "none"
    mix_alpha: Annotated[
        float, Meta(gt=0, description="of the Beta(α, α) that draws the mixed share; SnapMix's paper has 5")
    ] = 1.0
    mix_share: Annotated[float, Meta(gt=0, le=1, description="probability that a batch is mixed")] = 1.0
    min_area: Annotated[
        float, Meta(gt=0, le=1, description="smallest share of a picture that a training crop takes")
    ] = 0.4
    color: Annotated[float, Meta(ge=0, lt=1, description="greatest change of brightness, contrast and saturation")] = (
        0.25
    )
    hue: Annotated[
        float, Meta(ge=0, le=0.5, description="greatest change of hue, as a share of the colour circle; 0: none")
    ] = 0.0
    flip: Annotated[
        Literal["none", "horizontal", "both"],
        Meta(
            description="mirror half of the pictures: none where left and right differ, both where there is no upright"
        ),
    ] = "horizontal"
    rotation: Annotated[float, Meta(ge=0, le=180, description="greatest rotation in degrees")] = 0.0
    randaugment: Annotated[
        int, Meta(ge=0, le=30, description="magnitude of two RandAugment operations (Cubuk et al. 2020); 0: none")
    ] = 0
    crop_epochs: Annotated[
        int,
        Meta(
            ge=0,
            description="epochs after which the very same training crops come again, so that what teachers said of"
            " them (--answers) is all there; 0: every epoch has new ones",
        ),
    ] = 0
    center_weight: Annotated[
        float, Meta(ge=0, description="weight of the center loss (Wen et al. 2016: 0.003); 0: none")
    ] = 0.0
    triplet_weight: Annotated[
        float, Meta(ge=0, description="weight of the triplet loss with mining (Hermans et al. 2017); 0: none")
    ] = 0.0
    mining: Annotated[
        Literal["hard", "semihard"],
        Meta(description="triplets: the hardest of each anchor, or all that violate the margin but not the order"),
    ] = "hard"
    sampler: Annotated[
        Literal["shuffle", "balanced", "pk"],
        Meta(description="every image once; classes alike often; or batches of P classes × K images"),
    ] = "shuffle"
    per_class: Annotated[int, Meta(ge=2, description="K of the pk sampler")] = 4

    def __post_init__(self) -> None:
        if 0 < self.train_size < _LEAST_SIZE:
            raise ValueError(f"--train-size {self.train_size}: needed 0, or at least {_LEAST_SIZE}")

    def crop_seed(self, epoch: int) -> int:
        """Return the seed of the order and the augmentation of an epoch (from 0)."""
        return self.seed * 100_003 + (epoch % self.crop_epochs if self.crop_epochs else epoch)

    def size_at(self, epoch: int) -> int:
        """Return the network input of training at an epoch (from 0), pixels; a multiple of 16 while it grows."""
        full = self.train_size or self.image_size
        share = min(1.0, epoch / (0.75 * self.epochs))
        if not self.start_size or share >= 1:
            return full
        return max(_LEAST_SIZE, round((self.start_size + (full - self.start_size) * share) / 16) * 16)


class Transfer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """What a student learns of its teachers."""

    loss: Annotated[
        Literal["kl", "dkd", "dist"],
        Meta(
            description="of the predictions: their divergence (Hinton et al. 2015), the target class's and the others'"
            " apart (Zhao et al. 2022), or relations between and within classes (Huang et al. 2022)"
        ),
    ] = "kl"
    temperature: Annotated[float, Meta(gt=0, description="softens both predictions")] = 1.0
    dkd_beta: Annotated[
        Annotated[float, Meta(ge=0)] | None,
        Meta(
            description="dkd: weight of the classes other than the image's own, relative to that one's; left out: the"
            " paper's, 0.5 up to a temperature of 1 (ImageNet) and 8 above (CIFAR-100)",
        ),
    ] = None
    hard_weight: Annotated[
        Annotated[float, Meta(ge=0, le=1)] | None,
        Meta(
            description="share of the loss that is cross entropy to the labels, the rest is of the predictions; left"
            " out: 0 with kl (Beyer et al. 2022), 0.5 with dkd and dist, which is their papers' sum, halved",
        ),
    ] = None
    feature_weight: Annotated[
        float, Meta(ge=0, description="weight of matching the last feature maps (Romero et al. 2015); 0: none")
    ] = 0.0
    attention_weight: Annotated[
        float,
        Meta(ge=0, description="weight of matching where these are strong (Zagoruyko & Komodakis 2017); 0: none"),
    ] = 0.0
    teacher_size: Annotated[
        int,
        Meta(
            ge=0,
            le=4096,
            description="size at which the teachers see the crops, pixels; what they were trained at may suit them"
            " better than what they are tested at; 0: their own image size",
        ),
    ] = 0

    @property
    def needs_maps(self) -> bool:
        """Whether feature maps are matched."""
        return self.feature_weight > 0 or self.attention_weight > 0

    @property
    def beta(self) -> float:
        """β of DKD: as asked, else as Zhao et al. (2022) have it at such a temperature, T = 1 or T = 4."""
        if self.dkd_beta is not None:
            return self.dkd_beta
        return 0.5 if self.temperature <= 1 else 8.0

    @property
    def hard_share(self) -> float:
        """Share of cross entropy in the loss: as asked, else that of the loss's paper.

        DKD's sum is CE + TCKD + β·NCKD (Zhao et al. 2022), DIST's CE + 2·inter + 2·intra (Huang et al. 2022, equation
        10). A half of each keeps these ratios. DIST needs it: it leaves open how sure the student becomes.
        """
        if self.hard_weight is not None:
            return self.hard_weight
        return 0.0 if self.loss == "kl" else 0.5

    def words(self) -> list[str]:
        """Say what is learnt, for a checkpoint's header: what was left out is said as it was taken."""
        words = [f"T={self.temperature:g}", f"hard={self.hard_share:g}"]
        if self.teacher_size:
            words.append(f"teachers at {self.teacher_size} px")
        if self.loss != "kl":
            words.append(f"loss={self.loss}" + (f" β={self.beta:g}" if self.loss == "dkd" else ""))
        weights = {"features": self.feature_weight, "attention": self.attention_weight}
        return words + [f"{name}={weight:g}" for name, weight in weights.items() if weight]

    def of_predictions(self) -> Transfer:
        """Return the same without feature maps."""
        return msgspec.structs.replace(self, feature_weight=0.0, attention_weight=0.0)


class Pruning(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Which channels are removed, and how many."""

    macs: Annotated[
        float | None,
        Meta(description="share of the multiply-accumulates to keep, 0 to 1; 0.7 where no other target is given"),
    ] = None
    params: Annotated[float | None, Meta(description="share of the parameters to keep, instead")] = None
    latency: Annotated[
        float | None,
        Meta(
            description="share of the latency to keep, instead; measured on this machine, with the ONNX export in ONNX"
            " Runtime, beside the unpruned network",
        ),
    ] = None
    latency_precision: Annotated[Literal["fp32", "int8"], Meta(description="the export whose latency is measured")] = (
        "fp32"
    )
    importance: Annotated[
        Literal["taylor", "magnitude", "fpgm", "bn-scale"],
        Meta(
            description="what a channel is worth: the change of the loss (Molchanov et al. 2019), the norm of its"
            " weights (Li et al. 2017), its distance from the layer's other filters (He et al. 2019), or the scale of"
            " its batch norm (Liu et al. 2017)"
        ),
    ] = "taylor"
    isomorphic: Annotated[
        bool,
        Meta(description="rank channels among layers of like structure (Fang et al. 2024), not among all"),
    ] = False
    uniform: Annotated[
        bool, Meta(description="take the same share of every layer, its least important channels; a baseline")
    ] = False
    round_to: Annotated[
        int,
        Meta(ge=1, description="channel counts become multiples of this; 16 suits INT8 kernels, 8 floating point"),
    ] = 16
    max_ratio: Annotated[
        float,
        Meta(
            gt=0,
            lt=1,
            description="greatest share of its channels that a layer may lose; what must be left is rounded up to a"
            " multiple of --round-to",
        ),
    ] = 0.25
    rounds: Annotated[
        int,
        Meta(ge=1, description="cut the way to the target into this many parts, with fine-tuning after each"),
    ] = 1
    round_epochs: Annotated[
        int, Meta(ge=1, description="epochs of fine-tuning after each round but the last, which has --epochs")
    ] = 1

    def target(self) -> tuple[Measure, float]:
        """Return what is to shrink, and to which share of the unpruned network's.

        Raises:
            DataError: several targets, one that is out of range, or two ways to rank were given.
        """
        measures: tuple[Measure, ...] = ("macs", "params", "latency")
        given = [(measure, share) for measure in measures if (share := getattr(self, measure)) is not None]
        if len(given) > 1:
            named = " and ".join(f"--{measure} {share:g}" for measure, share in given)
            raise DataError(f"{named} were given; needed one target: leave out all but one")
        if self.isomorphic and self.uniform:
            raise DataError("--isomorphic and --uniform were given; each is a way to rank: leave out one")
        for measure, share in given:
            if not 0 < share < 1:
                raise DataError(f"--{measure} {share:g} is out of range: needed a share between 0 and 1")
        return given[0] if given else ("macs", 0.7)


class Hardware(msgspec.Struct, frozen=True, kw_only=True):
    """Where a stage runs. Rounding depends on it, and the order of random numbers on ``workers`` and ``devices``."""

    accelerator: Annotated[str, Meta(description="Lightning Fabric's accelerator: auto, cpu, cuda or mps")] = "auto"
    devices: Annotated[int, Meta(ge=1, description="how many of them")] = 1
    precision: Annotated[
        str,
        Meta(description="auto (bf16 or fp16 mixed on CUDA, else 32 bit), or Lightning Fabric's name, as bf16-mixed"),
    ] = "auto"
    workers: Annotated[int, Meta(ge=0, description="processes that decode and augment")] = 1


def choices_of(settings: type[msgspec.Struct], field: str) -> tuple[Any, ...]:
    """Return the values that a field of a settings struct may take where its type lists them; else nothing."""
    hint = typing.get_type_hints(settings).get(field)  # without the Annotated around it
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
