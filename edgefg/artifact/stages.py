"""Stage records: how a checkpoint or an artifact was made, one record for each stage. No torch.

Records are typed, and runs are compared by their values. Rewording a message, or adding a setting with a default, does
not change the record of an earlier run. A new kind of stage raises the schema of headers and manifests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import msgspec
from msgspec.structs import replace

from edgefg.errors import ManifestError
from edgefg.settings.distillation import DistillationConfig
from edgefg.settings.export import ExportConfig
from edgefg.settings.options import options_of
from edgefg.settings.pruning import Cost, PruningConfig
from edgefg.settings.quantization import Precision, QuantizationConfig, TargetName
from edgefg.settings.training import TrainingConfig

OptionValue = bool | int | float | str | tuple[str, ...] | None


class StartingWeights(msgspec.Struct, frozen=True, kw_only=True):
    """Source of a network's initial weights."""

    source: str
    """``hub``, ``none``, a weight package, or a file."""
    sha256: str | None = None
    """Of a file, which may be replaced by another of the same name."""


class UnlabelledImages(msgspec.Struct, frozen=True, kw_only=True):
    """Images without labels that were added to the training images."""

    count: int
    fingerprint: str


class RelativeCost(msgspec.Struct, frozen=True, kw_only=True):
    """Cost of a pruned network, relative to the unpruned one."""

    macs: float
    params: float
    latency: float | None = None
    """None: not measured."""

    def of(self, cost: Cost) -> float:
        """Return one of the costs. Raises `ValueError` if it was not measured."""
        share: float | None = getattr(self, cost)
        if share is None:
            raise ValueError(f"{cost} was not measured")
        return share

    def render(self) -> str:
        """Return the costs as a few words."""
        latency = "" if self.latency is None else f", {self.latency:.3f} of the latency"
        return f"{self.macs:.3f} of the MACs, {self.params:.3f} of the parameters{latency}"


_S = TypeVar("_S", bound="_Stage")


class _Stage(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind"):
    parents: tuple[str, ...] = ()
    """SHA-256 of the input checkpoints: first the one that was changed, then its teachers."""
    versions: dict[str, str] = {}
    """Package → version of the software that did the work."""

    def identity(self: _S) -> _S:
        """Return the request: the record without results and versions."""
        return replace(self, versions={})

    def render(self) -> str:
        """Return one line for people. Settings that have their default value are left out."""
        names = sorted(self.__struct_fields__, key=lambda name: name in _Stage.__struct_fields__)
        words = [word for name in names for word in _words(name, getattr(self, name))]
        return f"{self.__struct_config__.tag}: {', '.join(words)}"


class TrainStage(_Stage, frozen=True, kw_only=True, tag="train"):
    """A teacher was trained on labels."""

    method: str
    options: dict[str, OptionValue] = {}
    """Of the method."""
    backbone: str
    weights: StartingWeights
    training: TrainingConfig


class DistillStage(_Stage, frozen=True, kw_only=True, tag="distill"):
    """A student learned from its teachers, the parents."""

    backbone: str
    weights: StartingWeights
    training: TrainingConfig
    distillation: DistillationConfig
    unlabelled: UnlabelledImages | None = None


class PruneStage(_Stage, frozen=True, kw_only=True, tag="prune"):
    """Channels were removed from a student, which was then fine-tuned. Parents: the student, and its teacher if any."""

    pruning: PruningConfig
    training: TrainingConfig
    distillation: DistillationConfig | None = None
    """None: fine-tuned on labels."""
    remaining: RelativeCost | None = None

    def identity(self) -> PruneStage:
        """Return the request: the record without results and versions."""
        return replace(self, versions={}, remaining=None)


class QATStage(_Stage, frozen=True, kw_only=True, tag="qat"):
    """A network was trained with the rounding of a target's INT8 graph. Parents: the network and its teacher."""

    target: TargetName
    quantization: QuantizationConfig
    training: TrainingConfig
    distillation: DistillationConfig


class EnsembleStage(_Stage, frozen=True, kw_only=True, tag="ensemble"):
    """The predictions of the parents are averaged."""


class WeightAverageStage(_Stage, frozen=True, kw_only=True, tag="average-weights"):
    """The weights of the parents were averaged."""


class ExportStage(_Stage, frozen=True, kw_only=True, tag="export"):
    """A checkpoint, the parent, was exported to an artifact."""

    target: TargetName
    precision: Precision
    config: ExportConfig
    quantization: QuantizationConfig | None = None
    """How INT8 was calibrated, with the layers that were kept in floating point. None: not calibrated here."""


TrainedStage = TrainStage | DistillStage | PruneStage | QATStage
"""Stages that train a network."""
StageRecord = TrainedStage | EnsembleStage | WeightAverageStage | ExportStage


def versions_of(*packages: str) -> dict[str, str]:
    """Return the versions of edgefg and of installed packages."""
    from importlib.metadata import version  # slow to import, and not needed where records are only read

    return {package: version(package) for package in ("edgefg", *packages)}


def encode_stages(stages: Sequence[StageRecord]) -> tuple[dict[str, Any], ...]:
    """Return records as a manifest keeps them."""
    return msgspec.json.decode(msgspec.json.encode(stages), type=tuple[dict[str, Any], ...])


def decode_stages(stages: Sequence[dict[str, Any]]) -> tuple[StageRecord, ...]:
    """Return the records that a manifest keeps.

    Raises:
        ManifestError: a later edgefg wrote kinds or settings that this one does not know.
    """
    try:
        return msgspec.convert(stages, tuple[StageRecord, ...])
    except msgspec.ValidationError as exc:
        raise ManifestError(f"this edgefg cannot read the record of the stages ({exc}). Upgrade edgefg") from exc


def render_stages(stages: Sequence[StageRecord]) -> str:
    """Return one line for each stage, for people."""
    return "\n".join(f"{number}. {stage.render()}" for number, stage in enumerate(stages, 1))


def _words(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, StartingWeights):
        yield f"{name} {value.source}" + (f" ({value.sha256[:12]})" if value.sha256 else "")
    elif isinstance(value, RelativeCost):
        yield f"{name} {value.render()}"
    elif isinstance(value, UnlabelledImages):
        yield f"{value.count} unlabelled images"
    elif isinstance(value, msgspec.Struct):
        defaults = type(value)()
        pairs = (
            (option.flag, option.value_in(value), option.value_in(defaults))
            for option in options_of(type(value)).values()
        )
        yield from (f"{flag} {given}" for flag, given, default in pairs if given != default)
    elif name == "parents":
        yield from (f"parent {digest[:12]}" for digest in value)
    elif isinstance(value, dict):
        yield from (f"{key} {entry}" for key, entry in value.items())
    elif value is not None:
        yield f"{name} {value}"
