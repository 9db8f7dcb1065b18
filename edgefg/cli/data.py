"""Verbs on data sets: data, folds."""

from __future__ import annotations

from pathlib import Path

from edgefg.cli.app import command, needs, print_json
from edgefg.cli.options import Count, Flag, GroupPattern, Json, Natural, Out, SkipCorrupt, SplitSeed
from edgefg.log import get_logger
from edgefg.settings.split import SplitSpec

_log = get_logger(__name__)


@command
def data(
    data: Path,
    /,
    *,
    csv: Path | None = None,
    split_seed: SplitSeed = 0,
    group: GroupPattern = None,
    quick: Flag = False,
    json: Json = False,
) -> None:
    """Describe a data set and find its faults.

    Faults are unreadable images, and images that appear in two splits or under two labels.

    Args:
        data: DATA/{train,val,test}/<class>/*.jpg; DATA/<class>/*.jpg; a CSV file with the columns path and label, and
            optionally split, group and condition; the folder of CUB-200-2011; or NAME:ROOT for a data set of
            torchvision (fgvc-aircraft, stanford-cars, oxford-pets, flowers-102, inaturalist).
        csv: Write the data set and its splits to this CSV file, with taxonomy.csv and boxes.csv beside it if needed.
        quick: Do not search for near duplicates.
    """
    from edgefg.data.dataset import load_dataset, write_manifests
    from edgefg.data.describe import describe, render

    loaded = load_dataset(data, SplitSpec(seed=split_seed, group=group), skip_corrupt=True)
    summary = describe(str(data), loaded, duplicates=not quick)
    if csv is not None:
        write_manifests({csv: loaded.splits}, loaded, loaded.groups)
        _log.info("written: %s", csv)
    if json:
        print_json(summary)
    else:
        print(render(summary, loaded))


@command
def folds(
    data: Path,
    /,
    *,
    out: Out,
    count: Count = 3,
    clusters_per_class: Natural = 0,
    group: GroupPattern = None,
    backbone: str = "tf_efficientnet_lite0",
    weights: str = "hub",
    seed: int = 0,
    skip_corrupt: SkipCorrupt = False,
) -> None:
    """Write the folds of a cross-validation as CSV files.

    Each of OUT/fold-0.csv, OUT/fold-1.csv and so on is a data set for `edgefg train`: one fold is val, the others are
    train. Test images are left out. Groups of the data stay together. Data without groups may show one scene in several
    images; --clusters-per-class then groups images by appearance, so that folds do not share scenes.

    Args:
        data: The data set; see `edgefg data`.
        count: Number of folds.
        clusters_per_class: Divide each class into this many groups of similar images. 0: the data's own groups.
        backbone: Backbone whose embeddings measure similarity.
        weights: The backbone's pretrained weights; see `edgefg train`.
        seed: Seed of the assignment to folds.
    """
    from edgefg.data.dataset import load_dataset, write_manifests
    from edgefg.data.split import split_folds

    spec = SplitSpec(seed=seed, group=group)
    loaded = load_dataset(data, spec, skip_corrupt=skip_corrupt)
    samples = loaded.splits["train"] + loaded.splits["val"]
    groups = loaded.groups
    if clusters_per_class:
        with needs("train"):
            from edgefg.training.data.appearance import cluster_by_appearance
        groups = cluster_by_appearance(samples, clusters_per_class, backbone=backbone, weights=weights)
    parts = split_folds(samples, count, loaded.root, spec, groups)
    manifests = {}
    for held_out in range(count):
        rest = [sample for part, members in enumerate(parts) if part != held_out for sample in members]
        manifests[out / f"fold-{held_out}.csv"] = {"train": sorted(rest), "val": parts[held_out]}
    write_manifests(manifests, loaded, groups)
    for path, splits in manifests.items():
        print(f"{path}: {len(splits['train'])} training images, {len(splits['val'])} validation images")
