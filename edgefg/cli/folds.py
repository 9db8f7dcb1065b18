"""The verb `folds`: cross-validation folds as CSV manifests."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgefg.cli.app import Count, command, needs
from edgefg.settings.split import SplitSpec


@command
def folds(
    data: Path,
    out: Annotated[Path, typer.Option()],
    count: Count = 3,
    clusters_per_class: Annotated[int, typer.Option(min=0)] = 0,
    group: str | None = None,
    backbone: str = "tf_efficientnet_lite0",
    weights: str = "hub",
    seed: int = 0,
    skip_corrupt: bool = False,
) -> None:
    """Write cross-validation folds of the training and validation images as CSV manifests: OUT/fold-0.csv and so on.

    In each manifest one fold is val and the others are train; test images are not used. Groups of the data set stay
    whole. If it has none, pictures of one scene would be in several folds and the figures too good:
    --clusters-per-class groups images by appearance instead.

    Args:
        data: the data set.
        out: folder for the manifests.
        count: number of folds.
        clusters_per_class: divide each class into this many groups of similar images; 0: use the data set's groups.
        group: regular expression; images whose paths have the same match stay in one fold.
        backbone: backbone whose embeddings are clustered.
        weights: pre-trained weights of the backbone, see `edgefg train`.
        seed: seed of the assignment to folds.
        skip_corrupt: leave unreadable images out instead of stopping.
    """
    from edgefg.data.dataset import load_dataset, write_manifests
    from edgefg.data.split import split_folds

    spec = SplitSpec(seed=seed, group=group)
    loaded = load_dataset(data, spec, skip_corrupt=skip_corrupt)
    samples = loaded.splits["train"] + loaded.splits["val"]
    groups = loaded.groups
    if clusters_per_class:
        try:
            from edgefg.training.data.appearance import cluster_by_appearance
        except ImportError as exc:
            raise needs("train", exc) from exc
        groups = cluster_by_appearance(samples, clusters_per_class, backbone=backbone, weights=weights)
    folds = split_folds(samples, count, loaded.root, spec, groups)
    manifests = {}
    for held_out in range(count):
        rest = [sample for fold, members in enumerate(folds) if fold != held_out for sample in members]
        manifests[out / f"fold-{held_out}.csv"] = {"train": sorted(rest), "val": folds[held_out]}
    write_manifests(manifests, loaded, groups)
    for path, splits in manifests.items():
        print(f"{path}: {len(splits['train'])} training images, {len(splits['val'])} validation images")
