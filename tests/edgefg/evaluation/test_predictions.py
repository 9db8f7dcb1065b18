from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from edgefg import Classifier
from edgefg.errors import DataError
from edgefg.evaluation.predictions import evaluate
from edgefg.metrics import Scores
from edgefg.settings.split import SplitSpec
from tests.benchmarks.conftest import MakeArtifact


def evaluate_artifact(model: Path, data: Path, split: str | None = None, **options: bool) -> Scores:
    with Classifier(model) as classifier:
        return evaluate(classifier, data, split, **options).scores


def test_scores_the_test_split_by_class_name(null_artifact: MakeArtifact, data: Path) -> None:
    # The labels are not in alphabetical order, and always "pear" is said.
    model = null_artifact(labels=("plum", "pear", "apple"), logits=(0.0, 2.0, 1.0))
    steps: list[tuple[int, int]] = []
    with Classifier(model) as classifier:
        found = evaluate(classifier, data, progress=lambda done, total: steps.append((done, total)))
    assert (found.split, found.skipped, found.scores.images) == ("test", (), 5)
    assert found.scores.top1 == pytest.approx(3 / 5)
    assert found.scores.balanced == pytest.approx(1 / 2)
    assert steps == [(i, 5) for i in range(1, 6)]


def test_a_split_without_all_classes(null_artifact: MakeArtifact, data: Path) -> None:
    assert evaluate_artifact(null_artifact(), data, split="val").top1 == 1


def test_the_temperature_is_the_manifests(null_artifact: MakeArtifact, data: Path) -> None:
    sharp, soft = (evaluate_artifact(null_artifact(name, temperature=t), data) for name, t in (("a", 0.1), ("b", 10.0)))
    assert sharp.top1 == soft.top1
    assert sharp.nll > soft.nll


def test_data_without_split_folders_are_taken_whole(null_artifact: MakeArtifact, data: Path) -> None:
    with Classifier(null_artifact()) as classifier:
        assert evaluate(classifier, data / "test").split == "all"


def test_corrupt_images_are_counted_and_named(null_artifact: MakeArtifact, data: Path) -> None:
    broken = data / "test" / "pear" / "1.png"
    broken.write_bytes(broken.read_bytes()[:100])
    model = null_artifact()
    with pytest.raises(DataError, match=r"1 of 5 images .*1\.png is cut off"):
        evaluate_artifact(model, data)
    with Classifier(model) as classifier:
        found = evaluate(classifier, data, skip_corrupt=True)
    assert found.scores.images == 4
    assert len(found.skipped) == 1
    assert "1.png" in found.skipped[0]


def test_nothing_but_corrupt_images(null_artifact: MakeArtifact, data: Path) -> None:
    for image in data.rglob("*.png"):
        image.write_bytes(b"")
    with pytest.raises(DataError, match=r"5 of 5 images .* and 2 more"):
        evaluate_artifact(null_artifact(), data, skip_corrupt=True)


def test_data_split_here_are_those_of_training_or_refused(null_artifact: MakeArtifact, tmp_path: Path) -> None:
    from edgefg.data import load_dataset

    flat, spec = tmp_path / "flat", SplitSpec(seed=1)
    for name in ("apple", "pear"):
        (flat / name).mkdir(parents=True)
        for i in range(10):
            cv2.imwrite(str(flat / name / f"{i}.png"), np.full((4, 4, 3), i, np.uint8))
    (flat / "pear" / "5.png").write_bytes(b"")
    trained = load_dataset(flat, spec, skip_corrupt=True)
    model = null_artifact(split=spec, dataset=trained.fingerprint)
    scores = evaluate_artifact(model, flat, skip_corrupt=True)
    assert scores.images == len(trained.splits["test"])
    with pytest.raises(DataError, match="1 of 20 images cannot be used"):
        evaluate_artifact(model, flat)
    (flat / "pear" / "4.png").unlink()
    with pytest.raises(DataError, match="training images may now be test images"):
        evaluate_artifact(model, flat, skip_corrupt=True)
