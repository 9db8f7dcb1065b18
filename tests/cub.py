"""A tiny data set in the files of CUB-200-2011."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

CLASSES = ("001.Black_footed_Albatross", "002.Laysan_Albatross")
POINTS = (
    *("back", "beak", "belly", "breast", "crown", "forehead", "left eye", "left leg", "left wing", "nape"),
    *("right eye", "right leg", "right wing", "tail", "throat"),
)


def write_cub(root: Path, per_class: int = 8) -> Path:
    """Write noise pictures of 40×60 pixels, a quarter of them for test, all with one box and one set of points."""
    rng = np.random.default_rng(0)
    lines: dict[str, list[str]] = {
        name: [] for name in ("images", "image_class_labels", "train_test_split", "bounding_boxes", "parts/part_locs")
    }
    number = 0
    for label, name in enumerate(CLASSES, start=1):
        (root / "images" / name).mkdir(parents=True)
        for i in range(per_class):
            number += 1
            file = f"{name}/{name[4:]}_{i:04d}_{number}.jpg"
            cv2.imwrite(str(root / "images" / file), rng.integers(0, 255, (40, 60, 3), np.uint8))
            lines["images"].append(f"{number} {file}")
            lines["image_class_labels"].append(f"{number} {label}")
            lines["train_test_split"].append(f"{number} {int(i % 4 != 3)}")
            lines["bounding_boxes"].append(f"{number} 5.0 4.0 50.0 30.0")
            for point in range(1, len(POINTS) + 1):
                lines["parts/part_locs"].append(f"{number} {point} {10.0 + 2 * point} {5.0 + point} 1")
    (root / "parts").mkdir()
    (root / "classes.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(CLASSES, start=1)))
    (root / "parts" / "parts.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(POINTS, start=1)))
    for name, rows in lines.items():
        (root / f"{name}.txt").write_text("\n".join(rows) + "\n")
    return root
