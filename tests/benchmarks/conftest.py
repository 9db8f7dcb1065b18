"""A null artifact and a small labelled data set, so that the benchmarks are tested without any engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest

from edgefg.artifact.hashes import file_info
from edgefg.artifact.manifest import Manifest, OutputSpec, Provenance, RuntimeInfo, encode_manifest, manifest_path
from edgefg.preprocess import InputSpec
from edgefg.settings.split import SplitSpec

MakeArtifact = Callable[..., Path]


@pytest.fixture
def null_artifact(tmp_path: Path) -> MakeArtifact:
    """Write a null artifact that always gives the same logits, and return its model file."""

    def make(
        name: str = "null",
        *,
        labels: Sequence[str] = ("apple", "pear"),
        logits: Sequence[float] = (0.0, 1.0),
        size: int = 16,
        temperature: float = 1.0,
        split: SplitSpec | None = None,
        dataset: str | None = None,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        model = folder / "model.null"
        model.write_bytes(msgspec.json.encode({"shape": [1, size, size, 3], "logits": list(logits)}))
        manifest = Manifest(
            schema=1,
            model=model.name,
            labels=tuple(labels),
            input=InputSpec(height=size, width=size),
            output=OutputSpec(temperature=temperature),
            precision="fp32",
            runtime=RuntimeInfo(name="null", version="1"),
            files=(file_info(model),),
            provenance=Provenance(edgefg="0", parent="0" * 64, split=split, dataset=dataset),
        )
        manifest_path(model).write_bytes(encode_manifest(manifest))
        return model

    return make


@pytest.fixture
def fruit(tmp_path: Path) -> Path:
    """Two apples and three pears in ``test/``, one pear in ``val/``."""
    root = tmp_path / "fruit"
    generator = np.random.default_rng(0)
    for folder, count in (("test/apple", 2), ("test/pear", 3), ("val/pear", 1)):
        (root / folder).mkdir(parents=True)
        for i in range(count):
            cv2.imwrite(str(root / folder / f"{i}.png"), generator.integers(0, 256, (24, 32, 3), np.uint8))
    return root


@pytest.fixture
def data(fruit: Path) -> Path:
    return fruit
