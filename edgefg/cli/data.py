"""The verb that looks at a data set: data."""

from __future__ import annotations

import sys
from pathlib import Path

from edgefg.cli.app import command, needs, print_json
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
    """Show what a data set holds, and what is wrong with it: unreadable images, pictures in two splits or classes.

    Args:
        data: DATA/{train,val,test}/<class>/*.jpg; DATA/<class>/*.jpg; a CSV manifest with the columns path, label and,
            if wanted, split, group, condition; the folder of CUB-200-2011; or NAME:ROOT with NAME one of fgvc-aircraft,
            stanford-cars, oxford-pets, flowers-102 and inaturalist, as torchvision reads them.
        csv: write the data set, as split, to this file as a CSV manifest, with taxonomy.csv beside it where needed.
        split_seed: seed of the split of data without splits of their own.
        group: regular expression; images whose paths match alike (camera, patient, lot) stay in one split.
        quick: do not look for near duplicates.
        json: print one JSON object.
    """
    try:
        from edgefg.data.describe import describe, render
        from edgefg.data.load import load_data, write_lists
    except ImportError as exc:
        raise needs("train", exc) from exc
    loaded = load_data(data, SplitSpec(seed=split_seed, group=group), skip_corrupt=True)
    found = describe(str(data), loaded, duplicates=not quick)
    if csv is not None:
        write_lists({csv: loaded.splits}, loaded, loaded.groups)
        print(f"written: {csv}", file=sys.stderr)
    if json:
        print_json(found)
    else:
        print(render(found, loaded))
