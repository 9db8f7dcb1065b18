from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from edgefg.data.split import Sample
from edgefg.training.data.appearance import cluster_by_appearance


def test_similar_images_of_a_class_are_one_cluster(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    samples = []
    for label in (0, 1):
        for number in range(6):
            image = np.full((40, 40, 3), (30, 200)[number % 2], np.uint8)
            image[10:30, 10:30] = random.integers(90, 110, 3, np.uint8)
            path = tmp_path / f"{label}-{number}.png"
            cv2.imwrite(str(path), image)
            samples.append(Sample(path, label))
    clusters = cluster_by_appearance(samples, 2, backbone="test_resnet", weights="none", image_size=32)
    assert len(set(clusters.values())) == 4
    for label in (0, 1):
        dark, bright = (
            {clusters[tmp_path / f"{label}-{number}.png"] for number in range(start, 6, 2)} for start in (0, 1)
        )
        assert (len(dark), len(bright), dark & bright) == (1, 1, set())


def test_a_class_has_at_most_as_many_clusters_as_images(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), np.zeros((40, 40, 3), np.uint8))
    clusters = cluster_by_appearance([Sample(path, 3)], 5, backbone="test_resnet", weights="none", image_size=32)
    assert list(clusters.values()) == ["3-0"]
