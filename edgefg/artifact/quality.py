"""How good an artifact is: the figures that its manifest keeps, and the limits that it is held to.

Plain data; `edgefg.evaluation.gate` and `edgefg.evaluation.temperature` fill it in. The command line reads the options
of the gate and their help from here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import msgspec
from msgspec import Meta

if TYPE_CHECKING:
    from edgefg.metrics import Scores

_Share = Annotated[float, Meta(ge=0, le=1)]
# Classes shown to people.
_SHOWN = 5


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Base of these structs, as of all in the manifest: frozen, closed, defaults left out of the JSON."""


class Gate(_Part, frozen=True, kw_only=True, omit_defaults=False):
    """How much worse than its FP32 parent an artifact may be on the same images.

    `edgefg.evaluation.gate` has the rules.
    Encoded whole: a manifest's limits stay what they were where a later edgefg has other defaults.
    """

    max_drop: Annotated[
        float,
        Meta(
            ge=-100,
            le=100,
            description="greatest loss of top-1 against the parent, percentage points; one standard error more is"
            " allowed for, so that a few hundred images fail no sound artifact by chance",
        ),
    ] = 1.0
    max_class_drop: Annotated[
        float,
        Meta(
            ge=0,
            le=100,
            description="greatest loss of a class's recall, percentage points; so few images that chance may have"
            " taken them fail no class, a single one never does",
        ),
    ] = 10.0
    max_flips: Annotated[
        float,
        Meta(
            ge=0,
            le=100,
            description="most images that the parent has right and the artifact takes for another class, percent of"
            " all; one standard error more is allowed for; what others gain does not make up for them",
        ),
    ] = 5.0
    min_agreement: Annotated[
        float, Meta(ge=0, le=1, description="least share of images on which both name the same class, right or wrong")
    ] = 0.0


class Accuracy(_Part, frozen=True, kw_only=True):
    """Accuracy measured through `Classifier`."""

    data: str
    """What it was measured on: split and data set's name."""
    images: Annotated[int, Meta(ge=1)]
    top1: _Share
    top1_low: _Share
    """Lower end of the 95 % Wilson interval."""
    top1_high: _Share
    balanced: _Share
    """Mean of the per-class recalls."""

    @classmethod
    def of(cls, scores: Scores, data: str) -> Accuracy:
        """Keep of scores what a manifest or a checkpoint's header records; ``data`` names what was measured on."""
        return cls(
            data=data,
            images=scores.images,
            top1=scores.top1,
            top1_low=scores.top1_low,
            top1_high=scores.top1_high,
            balanced=scores.balanced,
        )


class TemperatureScaling(_Part, frozen=True, kw_only=True):
    """Whether confidences mean what they say: the fit of `OutputSpec.temperature` on the artifact's own logits.

    The figures after it are of images that the fit did not see: each part of the images is scaled with the temperature
    fitted on all others. Fitted and measured on the same images they would flatter.
    """

    data: str
    """What it was fitted on: split and data set's name."""
    images: Annotated[int, Meta(ge=1)]
    parts: Annotated[int, Meta(ge=0)]
    """Into how many parts the images were dealt; 0 where nothing was fitted."""
    ece_before: _Share
    """Expected calibration error (15 bins) at a temperature of 1."""
    ece_after: _Share
    """The same with the temperature in force, cross-validated."""
    nll_before: Annotated[float, Meta(ge=0)]
    """Mean negative log-likelihood of the right class at a temperature of 1, nats."""
    nll_after: Annotated[float, Meta(ge=0)]
    """The same with the temperature in force, cross-validated."""
    unchanged: str = ""
    """Why the temperature stayed at 1, where it did; the figures after are then those before."""

    def render(self) -> str:
        """Return it as one line of text for people."""
        on = f"on {self.data} ({self.images} images)"
        if self.unchanged:
            return f"ECE {self.ece_before:.2%}, NLL {self.nll_before:.3f} {on}; temperature left at 1: {self.unchanged}"
        return (
            f"ECE {self.ece_before:.2%} → {self.ece_after:.2%}, NLL {self.nll_before:.3f} → {self.nll_after:.3f} {on},"
            f" cross-validated in {self.parts} parts"
        )


class ClassDrop(_Part, frozen=True, kw_only=True):
    """A class that the artifact recognises less often than its parent."""

    label: str
    images: Annotated[int, Meta(ge=1)]
    """How many images have it as label."""
    parent_recall: _Share
    recall: _Share
    chance: _Share
    """Probability of so many lost images by chance, corrected for the number of classes (`edgefg.evaluation.gate`)."""

    def render(self) -> str:
        """Return it as a few words for people."""
        return f"{self.label}: recall {self.parent_recall:.1%} → {self.recall:.1%} of {self.images} images"


class Flip(_Part, frozen=True, kw_only=True):
    """Images that the parent has right with one class and the artifact takes for another."""

    label: str
    """Their class, and the parent's answer."""
    predicted: str
    """The artifact's answer."""
    images: Annotated[int, Meta(ge=1)]

    def render(self) -> str:
        """Return it as a few words for people."""
        return f"{self.label} → {self.predicted} ({self.images})"


class Comparison(_Part, frozen=True, kw_only=True):
    """An artifact and its FP32 parent on the same labelled images."""

    parent: Accuracy
    drop: float
    """Top-1 of the parent minus top-1 of the artifact, in percentage points."""
    drop_low: float
    """Lower end of the 95 % interval of the drop, for paired images (Bonett & Price 2012), percentage points."""
    drop_high: float
    drop_error: Annotated[float, Meta(ge=0)]
    """Standard error of the drop, for paired images, percentage points."""
    lost: Annotated[int, Meta(ge=0)]
    """Images that the parent has right and the artifact wrong: its flips."""
    gained: Annotated[int, Meta(ge=0)]
    """Images that the artifact has right and the parent wrong."""
    mcnemar_p: _Share
    """Probability of so lopsided a difference if both were equally good (exact McNemar test, two-sided)."""
    agreement: _Share
    """Share of images on which both name the same class, right or wrong."""
    logits: float
    """Greatest absolute difference of a logit."""
    parent_logits_max: float
    """Greatest absolute logit of the parent, to compare with."""
    worst: tuple[ClassDrop, ...]
    """The classes that lose most images, worst first: five, and all whose loss chance does not explain."""
    flips: tuple[Flip, ...]
    """Which class the lost images are taken for, the most frequent pair first; at most five pairs."""
    gate: Gate | None
    """The limits that it was held to; None where it was only measured."""

    def render(self) -> str:
        """Return it as a few lines of text for people."""
        lines = [
            f"drop {self.drop:+.2f} points (95 %: {self.drop_low:+.2f} to {self.drop_high:+.2f}; {self.lost} images"
            f" lost, {self.gained} gained, McNemar p = {self.mcnemar_p:.2g}), top-1 agreement {self.agreement:.2%}",
            f"greatest difference of a logit {self.logits:.3g} (parent's greatest logit: {self.parent_logits_max:.3g})",
            *(f"  {worst.render()}" for worst in self.worst[:_SHOWN]),
        ]
        if self.flips:
            lines.append(f"  flips: {', '.join(flip.render() for flip in self.flips)}")
        return "\n".join(lines)
