"""Assessment of a model on labelled images: all metrics of its predictions.

Artifacts and checkpoints, FP32 and INT8, are all assessed from `Predictions`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from edgefg import metrics
from edgefg.artifact.manifest import ClassDrop, Comparison
from edgefg.errors import DataError, InferenceError
from edgefg.evaluation import views
from edgefg.evaluation.gate import compare
from edgefg.evaluation.predictions import Predictions
from edgefg.metrics import softmax
from edgefg.taxonomy import TaxonomyLevel

RAREST = 5
"""How many of the rarest classes are shown and averaged, at most half of them."""
KEEP = 0.95
"""Share of the known images that the threshold for unknown ones keeps."""


class Proportion(msgspec.Struct, frozen=True):
    """A proportion with its 95 % Wilson interval, each in [0, 1]."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, part: int, whole: int) -> Proportion:
        """Return ``part`` of ``whole``."""
        return cls(part / whole, *metrics.wilson_interval(part, whole))

    def __str__(self) -> str:
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}]"


class ClassFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of one class; null if undefined."""

    name: str
    images: int
    train_images: int | None
    """How many training images it has; null if the data do not say."""
    recall: float | None
    precision: float | None
    f1: float | None


class ConfusedPair(msgspec.Struct, frozen=True, kw_only=True):
    """One class taken for another."""

    label: str
    predicted: str
    images: int
    of: int
    """How many images the label has."""


class LevelFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Accuracy on a coarser level of the taxonomy; a group's probability is the sum of its classes'."""

    level: str
    groups: int
    accuracy: Proportion


class Against(msgspec.Struct, frozen=True, kw_only=True):
    """Another model on the same images, for instance the FP32 parent of an INT8 artifact."""

    model: str
    """The other model; ``comparison`` calls it ``parent``."""
    comparison: Comparison
    classes: tuple[ClassDrop, ...]
    """The classes that the assessed model recognises less often.

    They are sorted by how improbable the loss is by chance, the least probable first.
    """


class AtRate(msgspec.Struct, frozen=True, kw_only=True):
    """Recall of the positive images, and the threshold on the summed probability that gives it."""

    recall: Proportion
    threshold: float | None
    """Null if no threshold satisfies the limit."""


class PositiveView(msgspec.Struct, frozen=True, kw_only=True):
    """Positive classes, such as defects, against all others.

    Thresholds are chosen on the images that they are measured on.
    """

    classes: tuple[str, ...]
    positives: int
    negatives: int
    roc_auc: float
    sensitivity_at_95_specificity: AtRate
    recall_at_1_false_reject: AtRate
    """At most 1 % of the negative images are called positive."""
    recall_at_5_false_reject: AtRate


class UnknownView(msgspec.Struct, frozen=True, kw_only=True):
    """Images of no known class, at the confidence threshold that keeps 95 % of the known ones."""

    folder: str
    images: int
    threshold: float
    kept: float
    """Share of the known images that reaches the threshold."""
    rejected: Proportion
    roc_auc: float
    """Probability that a known image has a higher confidence than an unknown one."""


class Assessment(msgspec.Struct, frozen=True, kw_only=True):
    """All figures of a model on a split."""

    model: str
    data: str
    split: str
    scores: metrics.Scores
    classes: tuple[ClassFigures, ...]
    rarest: tuple[str, ...]
    """The classes with fewest training images, or fewest images in this split if that is not known."""
    rare_recall: float
    """Mean recall of ``rarest``."""
    confused: tuple[ConfusedPair, ...]
    """All pairs of classes that were confused, most frequent first."""
    taxonomy: tuple[LevelFigures, ...]
    against: Against | None = None
    positive: PositiveView | None = None
    unknown: UnknownView | None = None
    skipped: tuple[str, ...] = ()
    """One line for each image that was left out as unreadable."""

    def as_json(self) -> dict[str, object]:
        """Return plain values, with the scores at the top level."""
        built = msgspec.to_builtins(self)
        scores = built.pop("scores")
        if self.against is not None:
            against = built["against"]
            built["against"] = {"model": against["model"], **against["comparison"], "classes": against["classes"]}
        return {**{name: built.pop(name) for name in ("model", "data", "split")}, **scores, **built}


def assess(
    found: Predictions,
    data: str,
    *,
    train_images: Mapping[str, int] | None = None,
    other: Predictions | None = None,
    positive: Sequence[str] = (),
    unknown: tuple[str, npt.NDArray[np.float32]] | None = None,
) -> Assessment:
    """Compute all metrics of a model's predictions.

    Args:
        found: the model's predictions.
        data: names the data in the report.
        train_images: the number of training images of each class, by name.
        other: another model's predictions of the same images.
        positive: names of the classes that count as positive.
        unknown: a folder of images of no known class and the model's logits of them, ``float32 [M, classes]``.

    Raises:
        DataError: ``other`` has other images or classes, a name in ``positive`` is not a class, or the split lacks
            positive or negative images.
        InferenceError: a logit is not finite.
    """
    predicted, targets, classes = found.predicted, found.targets, len(found.labels)
    scores = _score(found)
    figures = _class_figures(found, train_images)
    rare = _rarest(figures)
    support = {entry.name: entry.images for entry in figures}
    return Assessment(
        model=found.model,
        data=data,
        split=found.split,
        scores=scores,
        classes=figures,
        rarest=tuple(entry.name for entry in rare),
        rare_recall=float(np.mean([entry.recall for entry in rare])),
        confused=tuple(
            ConfusedPair(label=label, predicted=answer, images=pair.images, of=support[label])
            for pair in views.confusions(predicted, targets, classes)
            for label, answer in [(found.labels[pair.label], found.labels[pair.predicted])]
        ),
        taxonomy=tuple(_level(found, level) for level in found.taxonomy),
        against=_against(found, other) if other is not None else None,
        positive=_positive_view(found, positive) if positive else None,
        unknown=_unknown_view(found, *unknown) if unknown is not None else None,
        skipped=found.skipped,
    )


def _score(found: Predictions) -> metrics.Scores:
    try:
        return metrics.score(found.logits, found.targets, len(found.labels), found.temperature)
    except ValueError as exc:
        raise InferenceError(f"{found.model}: {exc}") from exc


def _class_figures(found: Predictions, train_images: Mapping[str, int] | None) -> tuple[ClassFigures, ...]:
    table = views.class_table(found.predicted, found.targets, len(found.labels))
    return tuple(
        ClassFigures(
            name=name,
            images=int(table.images[i]),
            train_images=None if train_images is None else train_images.get(name, 0),
            recall=_defined(table.recall[i]),
            precision=_defined(table.precision[i]),
            f1=_defined(table.f1[i]),
        )
        for i, name in enumerate(found.labels)
    )


def _rarest(figures: Sequence[ClassFigures]) -> list[ClassFigures]:
    present = [entry for entry in figures if entry.images]
    return sorted(present, key=lambda e: e.images if e.train_images is None else e.train_images)[
        : max(1, min(RAREST, len(present) // 2))
    ]


def _level(found: Predictions, level: TaxonomyLevel) -> LevelFigures:
    predicted, of_class = views.group_predictions(found.probabilities, level.groups)
    right = int((predicted == of_class[found.targets]).sum())
    return LevelFigures(level=level.name, groups=len(set(level.groups)), accuracy=Proportion.of(right, len(predicted)))


def _against(found: Predictions, other: Predictions) -> Against:
    theirs = _aligned(other, found)
    _score(theirs)  # names the model whose logits are not finite
    verdict = compare(found.logits, theirs.logits, found.targets, found.labels, found.split, None)
    return Against(model=other.model, comparison=verdict.comparison, classes=verdict.classes)


def _aligned(other: Predictions, found: Predictions) -> Predictions:
    """Bring another model's predictions into the order of this one's images and classes."""
    if set(other.labels) != set(found.labels):
        different = sorted(set(other.labels) ^ set(found.labels))
        raise DataError(
            f"{other.model} does not have the same classes as {found.model} (first: {different[0]!r});"
            " compare models of the same data set"
        )
    position = {sample.path: i for i, sample in enumerate(other.samples)}
    if set(position) != {sample.path for sample in found.samples}:
        raise DataError(
            f"{other.model} was measured on {len(other.samples)} images of {other.split}, {found.model} on"
            f" {len(found.samples)} of {found.split}, which are not the same; choose one with --split"
        )
    rows = [position[sample.path] for sample in found.samples]
    columns = [other.labels.index(name) for name in found.labels]
    return other._replace(logits=other.logits[rows][:, columns], samples=found.samples, labels=found.labels)


def _positive_view(found: Predictions, names: Sequence[str]) -> PositiveView:
    unique = tuple(dict.fromkeys(names))
    if missing := [name for name in unique if name not in found.labels]:
        raise DataError(f"--positive {missing[0]}: no such class; choose from {', '.join(found.labels)[:200]}")
    chosen = [found.labels.index(name) for name in unique]
    positive = np.isin(found.targets, chosen)
    if positive.all() or not positive.any():
        raise DataError(
            f"{int(positive.sum())} of the {len(positive)} images of {found.split} are of {', '.join(unique)};"
            " give images of these classes and of others"
        )
    scores = found.probabilities[:, chosen].astype(np.float64).sum(axis=1)

    def at(rate: float) -> AtRate:
        point = views.recall_at_false_positives(scores, positive, rate)
        threshold = point.threshold if np.isfinite(point.threshold) else None
        return AtRate(recall=Proportion.of(point.found, point.positives), threshold=threshold)

    return PositiveView(
        classes=unique,
        positives=int(positive.sum()),
        negatives=int((~positive).sum()),
        roc_auc=views.roc_auc(scores, positive),
        sensitivity_at_95_specificity=at(1 - 0.95),
        recall_at_1_false_reject=at(0.01),
        recall_at_5_false_reject=at(0.05),
    )


def _unknown_view(found: Predictions, folder: str, logits: npt.NDArray[np.float32]) -> UnknownView:
    known = found.probabilities.max(axis=1)
    unknown = softmax(logits, found.temperature).max(axis=1)
    rejection = views.reject_unknown(known, unknown, KEEP)
    both = np.concatenate([known, unknown])
    return UnknownView(
        folder=folder,
        images=rejection.unknown,
        threshold=rejection.threshold,
        kept=rejection.kept,
        rejected=Proportion.of(rejection.rejected, rejection.unknown),
        roc_auc=views.roc_auc(both, np.arange(len(both)) < len(known)),
    )


def _defined(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
