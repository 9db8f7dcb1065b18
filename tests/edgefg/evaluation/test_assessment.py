"""What is put together of predictions, against figures by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edgefg.data.split import Sample
from edgefg.errors import DataError, InferenceError
from edgefg.evaluation.assessment import assess
from edgefg.evaluation.predictions import Predictions
from edgefg.metrics import mcnemar_p
from edgefg.taxonomy import TaxonomyLevel

LABELS = ("oak", "elm", "carp")
TAXONOMY = (TaxonomyLevel(name="kingdom", groups=("plant", "plant", "animal")),)


def predictions(answers: str, targets: str, name: str = "a.onnx", labels: tuple[str, ...] = LABELS) -> Predictions:
    """Say classes by their first letters, image by image, each with a logit of 3."""
    of = {label[0]: i for i, label in enumerate(labels)}
    logits = 3 * np.eye(len(labels), dtype=np.float32)[[of[letter] for letter in answers]]
    samples = tuple(Sample(Path(f"{i}.jpg"), of[letter]) for i, letter in enumerate(targets))
    return Predictions(name, "test", samples, logits, labels, TAXONOMY)


def test_an_assessment_by_hand() -> None:
    found = assess(predictions("oeeoc", "ooeec"), "trees", train_images={"oak": 9, "elm": 2, "carp": 7})
    assert found.scores.top1 == pytest.approx(3 / 5)
    assert [(c.name, c.images, c.train_images, c.recall) for c in found.classes] == [
        ("oak", 2, 9, 0.5), ("elm", 2, 2, 0.5), ("carp", 1, 7, 1.0),
    ]  # fmt: skip
    assert found.rarest == ("elm",)
    assert found.rare_recall == 0.5
    assert [(p.label, p.predicted, p.images, p.of) for p in found.confused] == [
        ("oak", "elm", 1, 2), ("elm", "oak", 1, 2),
    ]  # fmt: skip
    # Both confusions stay within the plants.
    assert [(level.level, level.groups, level.accuracy.value) for level in found.taxonomy] == [("kingdom", 2, 1.0)]


def test_the_json_keeps_the_scores_beside_the_rest() -> None:
    found = json.loads(msgspec.json.encode(assess(predictions("oe", "oe"), "trees").as_json()))
    assert list(found)[:4] == ["model", "data", "split", "images"]
    assert {"top1", "nll", "coverage_at_5_risk", "classes", "confused", "taxonomy", "against"} <= set(found)
    assert found["classes"][2] == {
        "name": "carp", "images": 0, "train_images": None, "recall": None, "precision": None, "f1": None,
    }  # fmt: skip


def test_two_models_on_the_same_images_in_other_orders() -> None:
    mine = predictions("oeeoc", "ooeec", "int8.onnx")
    other = predictions("oeooc", "ooeec", "fp32.onnx")
    shuffled = other._replace(
        labels=("carp", "oak", "elm"),
        logits=other.logits[::-1][:, [2, 0, 1]],
        samples=tuple(Sample(s.path, (s.label + 1) % 3) for s in other.samples[::-1]),
    )
    for each in (other, shuffled):
        against = assess(mine, "trees", other=each).against
        assert against is not None
        found = against.comparison
        assert (against.model, found.gained, found.lost) == ("fp32.onnx", 1, 0)
        assert found.agreement == pytest.approx(4 / 5)
        assert found.drop == pytest.approx(-100 / 5)
        assert found.mcnemar_p == mcnemar_p(np.array([True]), np.array([False]))
        assert against.classes == ()
    against = assess(other, "trees", other=mine).against
    assert against is not None
    assert [(c.label, c.recall, c.parent_recall) for c in against.classes] == [("elm", 0.0, 0.5)]


def test_the_json_of_a_comparison_is_flat() -> None:
    found = assess(predictions("ooc", "oec"), "trees", other=predictions("oec", "oec", "fp32.onnx")).as_json()
    against = found["against"]
    assert isinstance(against, dict)
    assert (against["model"], against["lost"], against["gained"], against["parent"]["top1"]) == ("fp32.onnx", 1, 0, 1.0)
    assert [entry["label"] for entry in against["classes"]] == ["elm"]


def test_positive_classes_by_summed_probability() -> None:
    # Of elm and carp together; the second image, an elm, looks like an oak.
    view = assess(predictions("ooec", "oeec"), "trees", positive=("elm", "carp", "elm")).positive
    assert view is not None
    assert (view.classes, view.positives, view.negatives) == (("elm", "carp"), 3, 1)
    assert view.roc_auc == pytest.approx((1 + 1 + 0.5) / 3)
    at = view.sensitivity_at_95_specificity
    assert at.recall.value == pytest.approx(2 / 3)
    assert at.threshold == pytest.approx((math.exp(3) + 1) / (math.exp(3) + 2))


def test_unknown_images() -> None:
    flat = np.zeros((4, 3), np.float32)
    flat[0, 0] = 9
    view = assess(predictions("oec", "oec"), "trees", unknown=("blanks", flat)).unknown
    assert view is not None
    assert view.threshold == pytest.approx(math.exp(3) / (math.exp(3) + 2))
    assert (view.images, view.kept, view.rejected.value, view.roc_auc) == (4, 1.0, 0.75, 0.75)


def test_what_cannot_be_assessed_is_said() -> None:
    mine = predictions("oec", "oec")
    with pytest.raises(DataError, match="--positive fir: no such class; choose from oak, elm, carp"):
        assess(mine, "trees", positive=("fir",))
    with pytest.raises(DataError, match="0 of the 2 images of test are of carp"):
        assess(predictions("oe", "oe"), "trees", positive=("carp",))
    with pytest.raises(DataError, match=r"measured on 2 images of test, a\.onnx on 3"):
        assess(mine, "trees", other=predictions("oe", "oe", "b.onnx"))
    with pytest.raises(DataError, match=r"same classes .*'carp'"):
        assess(mine, "trees", other=predictions("oep", "oep", "b.onnx", ("oak", "elm", "pike")))
    with pytest.raises(InferenceError, match=r"a\.onnx: 3 of 3 images have logits that are not finite"):
        assess(mine._replace(logits=mine.logits * np.nan), "trees")
