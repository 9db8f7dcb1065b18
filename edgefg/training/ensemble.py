"""Combine trained checkpoints: an ensemble of their predictions, or one network with the mean of their weights.

edgefg ensemble runs/a/teacher.safetensors runs/b/teacher.safetensors --out runs/ensemble

Predictions of any networks of the same classes and data can be averaged. Averaging weights (a "model soup", Wortsman et
al. 2022) needs networks of one architecture that started from the same weights. It does not slow inference down.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from msgspec.structs import replace

from edgefg import __version__
from edgefg.artifact.hashes import sha256
from edgefg.artifact.stages import EnsembleStage, WeightAverageStage, versions_of
from edgefg.errors import DataError
from edgefg.training.checkpoint import SCHEMA, Header, load, save
from edgefg.training.models.ensemble import Ensemble, Member
from edgefg.training.models.network import Network

Average = Literal["predictions", "weights"]
"""Quantity that is averaged."""
# Header fields that networks must share to have their weights averaged. Batch norms depend on the image size.
_SAME_ARCHITECTURE = ("kind", "method", "options", "backbone", "channels", "mean", "std", "input")


class LoadedCheckpoint(NamedTuple):
    """A checkpoint in memory."""

    network: Network
    header: Header
    sha256: str
    """Of the file."""


def load_compatible(paths: Sequence[Path]) -> list[LoadedCheckpoint]:
    """Load checkpoints whose predictions can be averaged or compared.

    Raises:
        CheckpointError: one cannot be read.
        DataError: they have different classes, were trained on different data or splits, or one is given twice.
    """
    loaded: list[LoadedCheckpoint] = []
    for path in paths:
        network, header = load(path)
        loaded.append(LoadedCheckpoint(network, header, sha256(path)))
    first = loaded[0].header
    for path, other in zip(paths[1:], loaded[1:], strict=True):
        if other.header.labels != first.labels:
            raise DataError(
                f"{path} and {paths[0]} have different classes ({len(other.header.labels)} and {len(first.labels)}, or"
                " in another order). Use networks of the same classes"
            )
        if other.header.dataset != first.dataset:
            raise DataError(
                f"{path} and {paths[0]} were trained on different data or splits (fingerprints"
                f" {other.header.dataset[:12]} and {first.dataset[:12]}), so that one may have seen the other's test"
                " images. Use networks of one training split"
            )
    if len({one.sha256 for one in loaded}) < len(loaded):
        raise DataError(f"a checkpoint is given twice among {', '.join(map(str, paths))}. Give each once")
    return loaded


def combine(paths: Sequence[Path], out: Path, average: Average = "predictions") -> Path:
    """Combine checkpoints into one, and return its path.

    Args:
        paths: at least two checkpoints of the same classes and data.
        out: folder for ``teacher.safetensors`` or, with averaged weights, the file name of the networks' kind. The file
            must not exist.
        average: ``predictions``: an ensemble that runs every member at its own image size, and takes images of the
            largest one's. ``weights``: one network of the same architecture.

    Raises:
        CheckpointError: one cannot be read, or the result cannot be written.
        DataError: they are too few, or cannot be combined.
    """
    if len(paths) < 2:
        raise DataError(f"{len(paths)} checkpoint was given. Give at least two")
    loaded = load_compatible(paths)
    network, header = _average_weights(paths, loaded) if average == "weights" else _ensemble(paths, loaded)
    path = out / f"{header.kind}.safetensors"
    if path.exists():
        raise DataError(f"{path} exists. Give another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise DataError(f"cannot create {out}: {exc.strerror}") from exc
    save(path, network, replace(header, schema=SCHEMA, validation=None, edgefg=__version__))
    return path


def _ensemble(paths: Sequence[Path], loaded: Sequence[LoadedCheckpoint]) -> tuple[Network, Header]:
    headers = [one.header for one in loaded]
    for path, header in zip(paths, headers, strict=True):
        if header.members:
            raise DataError(f"{path} is an ensemble itself. Give its members instead")
        if replace(header.input, height=1, width=1) != replace(headers[0].input, height=1, width=1):
            raise DataError(f"{path} and {paths[0]} crop images differently. Use networks of one crop rule")
    largest = max(headers, key=lambda header: (header.input.height, header.input.width))
    header = replace(
        headers[0],
        kind="teacher",
        method="ensemble",
        options={},
        backbone=" + ".join(header.backbone for header in headers),
        channels={},
        input=largest.input,
        parent=None,
        stages=(EnsembleStage(parents=tuple(one.sha256 for one in loaded), versions=versions_of()),),
        recipe="",
        members=tuple(headers),
    )
    return Ensemble([Member(one.network, one.header.input) for one in loaded]), header


@torch.no_grad()
def _average_weights(paths: Sequence[Path], loaded: Sequence[LoadedCheckpoint]) -> tuple[Network, Header]:
    first = loaded[0].header
    for path, one in zip(paths[1:], loaded[1:], strict=True):
        if differing := [name for name in _SAME_ARCHITECTURE if getattr(one.header, name) != getattr(first, name)]:
            raise DataError(
                f"{path} and {paths[0]} differ in their {' and '.join(differing)}, so their weights cannot be averaged."
                " Average predictions instead"
            )
    if first.members:
        raise DataError(f"{paths[0]} is an ensemble, whose weights cannot be averaged. Average those of its members")
    network = loaded[0].network
    states = [one.network.state_dict() for one in loaded]
    mean = {
        # Counters of batches stay integers.
        name: torch.stack([state[name].double() for state in states]).mean(dim=0).to(tensor.dtype)
        for name, tensor in states[0].items()
    }
    network.load_state_dict(mean)
    stage = WeightAverageStage(parents=tuple(one.sha256 for one in loaded), versions=versions_of("torch"))
    return network, replace(first, stages=(*first.stages, stage))
