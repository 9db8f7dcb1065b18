"""Several trained checkpoints → one: an ensemble of their predictions, or one network of their mean weights.

edgefg ensemble runs/a/teacher.safetensors runs/b/teacher.safetensors --out runs/ensemble

Predictions of any networks of the same classes and data can be averaged. The mean of the weights (a "model soup",
Wortsman et al. 2022) needs networks of one make that began with the same weights; it costs nothing when it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from msgspec.structs import replace

from edgefg import __version__
from edgefg.artifact.hashes import sha256
from edgefg.errors import DataError
from edgefg.training.checkpoint import Header, load, save
from edgefg.training.models.ensemble import Ensemble, Member
from edgefg.training.models.network import Network

Average = Literal["predictions", "weights"]
"""What is averaged."""
# What one set of weights must have in common; the image size too, since batch norms' statistics depend on it.
_SAME = ("kind", "method", "options", "backbone", "channels", "mean", "std", "input")


class Trained(NamedTuple):
    """A checkpoint that was read."""

    network: Network
    header: Header
    sha256: str
    """Of its file."""


def read_alike(paths: Sequence[Path]) -> list[Trained]:
    """Load checkpoints that may be asked together, in evaluation mode.

    Raises:
        CheckpointError: one cannot be read.
        DataError: they differ in their classes or their data, or one is given twice.
    """
    read: list[Trained] = []
    for path in paths:
        network, header = load(path)
        read.append(Trained(network, header, sha256(path)))
    first = read[0].header
    for path, other in zip(paths[1:], read[1:], strict=True):
        if other.header.labels != first.labels:
            raise DataError(
                f"{path} and {paths[0]} have different classes ({len(other.header.labels)} and"
                f" {len(first.labels)}, or in another order); needed networks of the same ones"
            )
        if other.header.dataset != first.dataset:
            raise DataError(
                f"{path} and {paths[0]} were trained on different data or splits (fingerprints"
                f" {other.header.dataset[:12]} and {first.dataset[:12]}): one may know what the other's test holds;"
                " needed networks of one training split"
            )
    if len({one.sha256 for one in read}) < len(read):
        raise DataError(f"one checkpoint is given twice among {', '.join(map(str, paths))}; give each once")
    return read


def combine(paths: Sequence[Path], out: Path, average: Average = "predictions") -> Path:
    """Write one checkpoint of several, ``out/teacher.safetensors``, or, of students' weights, their kind's name.

    Args:
        paths: at least two checkpoints of the same classes and data.
        out: folder; must not hold such a file yet.
        average: ``predictions``: an ensemble, which looks with every member at its own image size, and at the size of
            the largest as a whole; ``weights``: one network of the same architecture.

    Raises:
        CheckpointError: one cannot be read, or the result cannot be written.
        DataError: too few, one twice, or they do not go together.
    """
    if len(paths) < 2:
        raise DataError(f"{len(paths)} checkpoint was given; needed at least two to average")
    read = read_alike(paths)
    network, header = _soup(paths, read) if average == "weights" else _ensemble(paths, read)
    path = out / f"{header.kind}.safetensors"
    if path.exists():
        raise DataError(f"{path} is there already; give another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise DataError(f"cannot create {out}: {exc.strerror}") from exc
    save(path, network, replace(header, validation=None, edgefg=__version__))
    return path


def _ensemble(paths: Sequence[Path], read: Sequence[Trained]) -> tuple[Network, Header]:
    headers = [one.header for one in read]
    for path, header in zip(paths, headers, strict=True):
        if header.members:
            raise DataError(f"{path} is an ensemble itself; give its members instead")
        if replace(header.input, height=1, width=1) != replace(headers[0].input, height=1, width=1):
            raise DataError(f"{path} and {paths[0]} crop images differently; needed networks of one crop rule")
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
        recipe=f"mean of the predictions of {len(read)} networks",
        members=tuple(headers),
    )
    return Ensemble([Member(one.network, one.header.input) for one in read]), header


@torch.no_grad()
def _soup(paths: Sequence[Path], read: Sequence[Trained]) -> tuple[Network, Header]:
    first = read[0].header
    for path, one in zip(paths[1:], read[1:], strict=True):
        if differing := [name for name in _SAME if getattr(one.header, name) != getattr(first, name)]:
            raise DataError(
                f"{path} and {paths[0]} differ in their {' and '.join(differing)}; the mean of weights needs networks"
                " of one make: average predictions instead"
            )
    if first.members:
        raise DataError(f"{paths[0]} is an ensemble, which has no one set of weights; average its members")
    network = read[0].network
    states = [one.network.state_dict() for one in read]
    mean = {
        # Counters of batches stay whole numbers.
        name: torch.stack([state[name].double() for state in states]).mean(dim=0).to(tensor.dtype)
        for name, tensor in states[0].items()
    }
    network.load_state_dict(mean)
    sums = " ".join(one.sha256 for one in read)
    return network, replace(
        first, recipe=f"mean of the weights of {len(read)} networks ({sums}); first: {first.recipe}"
    )
