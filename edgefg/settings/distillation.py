"""Settings of knowledge distillation."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta
from msgspec.structs import replace


class DistillationConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Losses with which a student learns from its teachers, and the size of the teachers' crops."""

    loss: Annotated[
        Literal["kl", "dkd", "dist"],
        Meta(
            description="Loss on the predictions: KL divergence (Hinton et al. 2015), decoupled distillation (Zhao et"
            " al. 2022), or correlations within and between classes (Huang et al. 2022)."
        ),
    ] = "kl"
    temperature: Annotated[float, Meta(gt=0, description="Temperature of the softmax of student and teacher.")] = 1.0
    dkd_beta: Annotated[
        Annotated[float, Meta(ge=0)] | None,
        Meta(
            description="Weight β of the non-target classes in dkd. Default: the paper's, 0.5 up to temperature 1"
            " (ImageNet) and 8 above (CIFAR-100).",
        ),
    ] = None
    hard_weight: Annotated[
        Annotated[float, Meta(ge=0, le=1)] | None,
        Meta(
            description="Share of the cross entropy with the labels in the loss. Default: 0 with kl (Beyer et al."
            " 2022), 0.5 with dkd and dist, as in their papers.",
        ),
    ] = None
    feature_weight: Annotated[
        float,
        Meta(ge=0, description="Weight of the distance of the last feature maps (Romero et al. 2015). 0: not used."),
    ] = 0.0
    attention_weight: Annotated[
        float,
        Meta(
            ge=0,
            description="Weight of the distance of the attention maps (Zagoruyko & Komodakis 2017). 0: not used.",
        ),
    ] = 0.0
    teacher_size: Annotated[
        int,
        Meta(
            ge=0,
            le=4096,
            description="Size of the crops that teachers see, in pixels. The size of their own training crops may suit"
            " them better than their image size. 0: their image size.",
        ),
    ] = 0

    @property
    def needs_maps(self) -> bool:
        """Whether feature maps are compared."""
        return self.feature_weight > 0 or self.attention_weight > 0

    @property
    def beta(self) -> float:
        """β of DKD. Zhao et al. (2022) use 0.5 at T = 1 and 8 at T = 4."""
        if self.dkd_beta is not None:
            return self.dkd_beta
        return 0.5 if self.temperature <= 1 else 8.0

    @property
    def hard_share(self) -> float:
        """Share of the cross entropy in the loss.

        The loss of DKD is CE + TCKD + β·NCKD (Zhao et al. 2022), that of DIST is CE + 2·inter + 2·intra (Huang et al.
        2022, equation 10). A share of one half keeps these ratios. DIST needs the cross entropy: correlations do not
        determine how confident the student becomes.
        """
        if self.hard_weight is not None:
            return self.hard_weight
        return 0.0 if self.loss == "kl" else 0.5

    def resolved(self) -> DistillationConfig:
        """Return the settings with values in place of None."""
        beta = self.beta if self.loss == "dkd" else self.dkd_beta
        return replace(self, hard_weight=self.hard_share, dkd_beta=beta)

    def without_maps(self) -> DistillationConfig:
        """Return the same settings, but compare predictions only."""
        return replace(self, feature_weight=0.0, attention_weight=0.0)
