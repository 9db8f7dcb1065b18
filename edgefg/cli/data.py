"""The verb `data`: summary of a data set."""

from __future__ import annotations

import sys
from pathlib import Path

from edgefg.cli.app import command, print_json
from edgefg.settings.split import SplitSpec


@command
def data(
    data: Path,
    csv: Path | None = None,
    split_seed: int = 0,
    group: str | None = None,
    quick: bool = False,
    json: bool = False,
) -> None:
    """Summarise a data set: sizes, unreadable images, and pictures in two splits or with two labels.

    Args:
        data: DATA/{train,val,test}/<class>/*.jpg; DATA/<class>/*.jpg; a CSV manifest with the columns path, label and
            optionally split, group, condition; the folder of CUB-200-2011; or NAME:ROOT, read by torchvision, with NAME
            one of fgvc-aircraft, stanford-cars, oxford-pets, flowers-102 and inaturalist.
        csv: write the split data set to this CSV manifest, with taxonomy.csv and boxes.csv beside it if necessary.
        split_seed: seed of the split, for data without fixed splits.
        group: regular expression; images whose paths have the same match (camera, patient, lot) stay in one split.
        quick: do not search for duplicates.
        json: print one JSON object.
    """
    from edgefg.data.dataset import load_dataset, write_manifests
    from edgefg.data.describe import describe, render

    loaded = load_dataset(data, SplitSpec(seed=split_seed, group=group), skip_corrupt=True)
    summary = describe(str(data), loaded, duplicates=not quick)
    if csv is not None:
        write_manifests({csv: loaded.splits}, loaded, loaded.groups)
        print(f"written: {csv}", file=sys.stderr)
    if json:
        print_json(summary)
    else:
        print(render(summary, loaded))
