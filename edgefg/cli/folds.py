"""The verb that writes folds for cross-validation: folds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgefg.cli.app import Count, command, needs
from edgefg.data.split import folds as deal
from edgefg.settings.split import SplitSpec


@command
def folds(
    data: Path,
    out: Annotated[Path, typer.Option()],
    count: Count = 3,
    look_alikes: Annotated[int, typer.Option(min=0)] = 0,
    group: str | None = None,
    backbone: str = "tf_efficientnet_lite0",
    weights: str = "hub",
    seed: int = 0,
    skip_corrupt: bool = False,
) -> None:
    """Write folds of train and val, without test, as CSV manifests for `edgefg train`: OUT/fold-0.csv and so on.

    In each of them one fold is val and the others are train. Groups of the data stay whole. Where they have none,
    pictures of one scene would fall into several folds, and the figures would flatter: --look-alikes groups by
    appearance instead.

    Args:
        data: the data set.
        out: folder for the manifests.
        count: how many folds.
        look_alikes: cut every class into this many groups of pictures that look alike; 0 takes the data's own groups.
        group: regular expression; images whose paths match alike stay in one fold.
        backbone: whose embedding tells what looks alike.
        weights: the backbone's pre-trained weights, see `edgefg train`.
        seed: seed of the dealing.
        skip_corrupt: leave unreadable images out instead of stopping.
    """
    try:
        from edgefg.data.load import load_data, write_lists
        from edgefg.training.data.appearance import appearance_groups
    except ImportError as exc:
        raise needs("train", exc) from exc
    spec = SplitSpec(seed=seed, group=group)
    loaded = load_data(data, spec, skip_corrupt=skip_corrupt)
    samples = loaded.splits["train"] + loaded.splits["val"]
    groups = loaded.groups
    if look_alikes:
        groups = appearance_groups(samples, look_alikes, backbone=backbone, weights=weights)
    parts = deal(samples, count, loaded.root, spec, groups)
    lists = {}
    for held_out in range(count):
        rest = [sample for part, members in enumerate(parts) if part != held_out for sample in members]
        lists[out / f"fold-{held_out}.csv"] = {"train": sorted(rest), "val": parts[held_out]}
    write_lists(lists, loaded, groups)
    for path, splits in lists.items():
        print(f"{path}: {len(splits['train'])} training images, {len(splits['val'])} held out")
