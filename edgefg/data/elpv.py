"""Demo data: the photographs of the ``elpv-dataset`` package as class folders.

    python -m edgefg.data.elpv runs/demo/data

2,624 electroluminescence images of solar cells, 300×300, with four levels of defect probability (Deitsch et al. 2019,
Buerhop et al. 2018; CC BY-NC-SA 4.0). Split 70/15/15 with a fixed seed, stratified by class and cell type.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from edgefg.data.split import Sample, split_samples
from edgefg.errors import DataError
from edgefg.settings.split import SplitSpec

LEVELS = ("functional", "possibly-defective", "probably-defective", "defective")


def write_elpv(out: Path) -> Path:
    """Write ``out/{train,val,test}/<level>/<number>-<mono|poly>.png`` and return ``out``. An existing folder is kept.

    Raises:
        DataError: the package is not installed, or the folder cannot be written.
    """
    if (out / "train").is_dir():
        return out
    import cv2

    try:
        from elpv_dataset.utils import load_dataset
    except ImportError as exc:
        raise DataError("the package elpv-dataset is not installed; pip install 'edgefg[demo]'") from exc
    images, probabilities, types = load_dataset()
    # Stratified by mono- and polycrystalline cells too: each combination counts as a class.
    levels = [round(3 * float(probability)) for probability in probabilities]
    samples = [
        Sample(Path(LEVELS[level]) / f"{number:04d}-{kind}.png", 2 * level + (kind == "mono"))
        for number, (level, kind) in enumerate(zip(levels, types, strict=True))
    ]
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for split, members in split_samples(samples, Path(), SplitSpec(seed=0)).items():
        for path, _ in members:
            target = partial / split / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if not cv2.imwrite(str(target), images[int(path.name[:4])]):
                raise DataError(f"cannot write {target}: is the disk full?")
    partial.replace(out)
    return out


if __name__ == "__main__":
    print(write_elpv(Path(sys.argv[1])))
