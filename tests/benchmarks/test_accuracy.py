from __future__ import annotations

from pathlib import Path

import pytest

from edgefg import Classifier
from edgefg.benchmarks.accuracy import evaluate, evaluate_artifact, labelled_images, split_folder
from edgefg.errors import DataError
from tests.benchmarks.conftest import MakeArtifact


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


def test_val_stands_in_for_test(data: Path) -> None:
    (data / "test").rename(data / "train")
    assert split_folder(data) == (data / "val", "val")


@pytest.mark.parametrize(
    ("split", "message"), [("train", "the splits val, test; needed train/"), ("dev", "needed dev/")]
)
def test_a_missing_split_is_named(data: Path, split: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        split_folder(data, split)


def test_train_alone_is_not_measured_on_unasked(data: Path) -> None:
    (data / "test").rename(data / "train")
    (data / "val").rename(data / "train" / "val")
    with pytest.raises(DataError, match="but train/"):
        split_folder(data)
    assert split_folder(data, "train")[1] == "train"


def test_missing_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere is not a folder"):
        split_folder(tmp_path / "nowhere")


def test_an_unknown_class_folder_is_named(data: Path) -> None:
    with pytest.raises(DataError, match=r"1 class folders .* \(first: 'pear'"):
        labelled_images(data / "test", ["apple", "Pear"])


def test_a_folder_without_classes_and_a_class_without_images(data: Path) -> None:
    with pytest.raises(DataError, match="holds no class folder"):
        labelled_images(data / "test" / "pear", ["apple", "pear"])
    (data / "test" / "plum").mkdir()
    with pytest.raises(DataError, match=r"plum holds no image"):
        labelled_images(data / "test", ["apple", "pear", "plum"])


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
