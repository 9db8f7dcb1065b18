from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from edgefg import Classifier
from edgefg.errors import DataError
from edgefg.evaluation.predictions import artifact_logits, evaluate, predict_files
from edgefg.image_io import read_image
from edgefg.metrics import Scores
from edgefg.progress import T, progress_shown_by
from edgefg.settings.split import SplitSpec
from tests.benchmarks.conftest import MakeArtifact


def evaluate_artifact(model: Path, data: Path, split: str | None = None, **options: Any) -> Scores:
    with Classifier(model) as classifier:
        return evaluate(classifier, data, split, **options).scores


def test_scores_the_test_split_by_class_name(null_artifact: MakeArtifact, fruit: Path) -> None:
    # The labels are not in alphabetical order, and always "pear" is said.
    model = null_artifact(labels=("plum", "pear", "apple"), logits=(0.0, 2.0, 1.0))
    with Classifier(model) as classifier:
        found = evaluate(classifier, fruit)
    assert (found.split, found.skipped, found.scores.images) == ("test", (), 5)
    assert found.scores.top1 == pytest.approx(3 / 5)
    assert found.scores.balanced == pytest.approx(1 / 2)


def test_a_split_without_all_classes(null_artifact: MakeArtifact, fruit: Path) -> None:
    assert evaluate_artifact(null_artifact(), fruit, split="val").top1 == 1


def test_the_temperature_is_the_manifests(null_artifact: MakeArtifact, fruit: Path) -> None:
    sharp, soft = (
        evaluate_artifact(null_artifact(name, temperature=t), fruit) for name, t in (("a", 0.1), ("b", 10.0))
    )
    assert sharp.top1 == soft.top1
    assert sharp.nll > soft.nll


def test_data_without_split_folders_are_taken_whole(null_artifact: MakeArtifact, fruit: Path) -> None:
    with Classifier(null_artifact()) as classifier:
        assert evaluate(classifier, fruit / "test").split == "all"


def test_corrupt_images_are_counted_and_named(null_artifact: MakeArtifact, fruit: Path) -> None:
    broken = fruit / "test" / "pear" / "1.png"
    broken.write_bytes(broken.read_bytes()[:100])
    model = null_artifact()
    with pytest.raises(DataError, match=r"1 of 5 images .*1\.png is cut off"):
        evaluate_artifact(model, fruit)
    with Classifier(model) as classifier:
        found = evaluate(classifier, fruit, skip_corrupt=True)
    assert found.scores.images == 4
    assert len(found.skipped) == 1
    assert "1.png" in found.skipped[0]


def test_nothing_but_corrupt_images(null_artifact: MakeArtifact, fruit: Path) -> None:
    for image in fruit.rglob("*.png"):
        image.write_bytes(b"")
    with pytest.raises(DataError, match=r"5 of 5 images .* and 2 more"):
        evaluate_artifact(null_artifact(), fruit, skip_corrupt=True)


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


def test_several_models_see_the_same_frames_and_each_image_is_read_once(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / f"{i}.png" for i in range(35)]
    for i, file in enumerate(files):
        cv2.imwrite(str(file), np.full((8, 8, 3), 7 * i, np.uint8))
    reads: list[Path] = []

    def read(path: Path) -> np.ndarray:
        reads.append(path)
        return read_image(path)

    monkeypatch.setattr("edgefg.evaluation.predictions.read_image", read)
    with Classifier(tiny("onnx")) as one, Classifier(tiny("onnx-batch4")) as other:
        first, second = predict_files([artifact_logits(one), artifact_logits(other)], files).logits
        expected = [one.predict(read_image(file)).logits for file in files]
    assert sorted(reads) == sorted(files)
    np.testing.assert_allclose(first, expected, atol=1e-5)
    np.testing.assert_allclose(second, expected, atol=1e-4)


def test_progress_and_the_images_that_are_kept(tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.png" for i in range(20)]
    for i, file in enumerate(files):
        if i in (0, 17):
            file.write_bytes(b"broken")
        else:
            cv2.imwrite(str(file), np.full((4, 4, 3), i, np.uint8))
    shown: list[object] = []

    def bar(items: Iterable[T], description: str, total: int | None) -> Iterator[T]:
        shown.append((description, total))
        for item in items:
            shown.append(item)
            yield item

    with progress_shown_by(bar):
        found = predict_files([lambda frames: np.array([[f[0, 0, 0]] for f in frames])], files, skip_corrupt=True)
    assert shown == [("classifying images", 20), *range(20)]
    assert found.kept == [i for i in range(20) if i not in (0, 17)]
    assert found.logits[0][:, 0].tolist() == found.kept
    assert len(found.skipped) == 2
