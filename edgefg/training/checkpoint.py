"""Checkpoints: a safetensors file with a JSON header, and no pickle.

A pruned network is stored as a state dict and a channel plan: the attributes of all layers whose width changed. The
plan is applied to a new backbone before the tensors are loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

import msgspec
import safetensors.torch
import torch
from msgspec.structs import replace
from safetensors import SafetensorError, safe_open
from torch import nn

from edgefg.artifact.manifest import Accuracy
from edgefg.artifact.stages import OptionValue, StageRecord, TrainedStage
from edgefg.errors import CheckpointError
from edgefg.files import atomic_file
from edgefg.preprocess import InputSpec
from edgefg.settings.options import differences
from edgefg.settings.quantization import TargetName
from edgefg.settings.split import SplitSpec
from edgefg.settings.training import TrainingConfig
from edgefg.taxonomy import TaxonomyLevel
from edgefg.training.methods import METHODS, build, method_options
from edgefg.training.models.backbone import build_backbone
from edgefg.training.models.ensemble import Ensemble, Member
from edgefg.training.models.network import Network

SCHEMA = 2
"""2: `Header.stages`."""
_KEY = "edgefg"
_WIDTHS = (
    *("in_channels", "out_channels", "groups", "in_features", "out_features"),
    *("num_features", "num_channels", "normalized_shape"),
)

ChannelPlan = dict[str, dict[str, int | tuple[int, ...]]]


class Quantized(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Target of a network that was trained with its rounding (kind ``qat``)."""

    to: TargetName
    """Target, whose rules say where it rounds."""
    reduce_range: bool = msgspec.field(default=False, name="any_cpu")
    """7-bit weights; ``any_cpu`` in the file, as in all earlier ones."""
    torch: str
    """Version that trained it: the names of the quantisers are its."""


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Everything in a checkpoint except its tensors."""

    schema: int
    kind: Literal["teacher", "student", "pruned", "qat"]
    method: str
    """One of `edgefg.training.methods.METHODS`, or ``ensemble``."""
    options: dict[str, OptionValue] = {}
    """All options of the method."""
    backbone: str
    labels: tuple[str, ...]
    input: InputSpec
    mean: tuple[float, float, float]
    """Per channel, in levels of 0 to 255."""
    std: tuple[float, float, float]
    taxonomy: tuple[TaxonomyLevel, ...] = ()
    channels: ChannelPlan = {}
    """Module name → widths that differ from those of a new backbone."""
    dataset: str
    """Fingerprint of the training data."""
    split: SplitSpec
    """How the data were split, if they have no split folders."""
    teacher: str | None = None
    """SHA-256 of the teacher's checkpoint."""
    parent: str | None = None
    """SHA-256 of the checkpoint that was pruned or quantised."""
    quantized: Quantized | None = None
    """Only of kind ``qat``, whose tensors `edgefg.export.qat.quantized_network` reads."""
    stages: tuple[StageRecord, ...] = ()
    """The stages that made it, the first one first."""
    recipe: str = ""
    """The stages in words, where checkpoints before schema 2 say no more."""
    validation: Accuracy | None = None
    members: tuple[Header, ...] = ()
    """Networks of an ensemble. Their tensors are called ``members.<number>.…``."""
    edgefg: str
    """Version that wrote it."""

    @property
    def training(self) -> TrainingConfig:
        """Settings of the training that made the tensors.

        Raises:
            CheckpointError: they are not recorded, as in checkpoints before schema 2.
        """
        stage = self.stages[-1] if self.stages else None
        if not isinstance(stage, TrainedStage):
            raise CheckpointError(f"the settings that trained this {self.kind} are not recorded. Train it again")
        return stage.training


class _SchemaOnly(msgspec.Struct):
    schema: int


def save(path: Path, network: nn.Module, header: Header) -> None:
    """Write a checkpoint atomically. Raises `CheckpointError` if that fails."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    write_tensors(path, tensors, msgspec.json.encode(header).decode())


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], header: str) -> None:
    """Atomically write named tensors and a JSON header."""
    try:
        with atomic_file(path) as temporary:
            safetensors.torch.save_file(tensors, temporary, metadata={_KEY: header})
    except (OSError, SafetensorError) as exc:
        raise CheckpointError(f"cannot write {path}: {exc}. An earlier file of that name is unchanged") from exc


def read_header_json(path: Path) -> str:
    """Return the JSON header of a file that `write_tensors` wrote. Raises `CheckpointError`."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist. Give a .safetensors checkpoint of edgefg")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(_KEY)
    except (OSError, SafetensorError) as exc:
        raise CheckpointError(
            f"{path} is not a complete safetensors file ({exc}). Copy it again, or train again"
        ) from exc
    if header is None:
        raise CheckpointError(f"{path} is not a checkpoint of edgefg. To start from its weights, use --weights")
    return str(header)


def read_header(path: Path) -> Header:
    """Read a checkpoint's header without its tensors. Raises `CheckpointError`."""
    text = read_header_json(path)
    try:
        schema = msgspec.json.decode(text, type=_SchemaOnly).schema
        if schema > SCHEMA:
            raise CheckpointError(f"{path} has schema {schema}, but this edgefg reads up to {SCHEMA}. Upgrade edgefg")
        return msgspec.json.decode(text, type=Header)
    except msgspec.DecodeError as exc:
        raise CheckpointError(f"{path} is not a checkpoint of a network, or its header is damaged ({exc})") from exc


def run_difference(stored: Header, wanted: Header) -> str:
    """Name the first setting in which two runs differ; empty if they are the same run.

    Results and software versions are not compared, and options that one of them lacks have their defaults.
    """
    if stored.schema < 2:
        return "settings that an earlier version of edgefg did not record"
    first = next(differences(_identity(stored), _identity(wanted)), None)
    return "" if first is None else "{} {}, now {}".format(*first)


def _identity(header: Header) -> dict[str, Any]:
    header = replace(
        header,
        schema=SCHEMA,
        options={},
        stages=tuple(stage.identity() for stage in header.stages),
        members=(),  # the parents of the ensemble's stage tell them apart
        validation=None,
        edgefg="",
    )
    tree = cast(dict[str, Any], msgspec.to_builtins(header))
    for stage in tree.get("stages", ()):
        if stage.get("method") in METHODS:
            stage["options"] = msgspec.to_builtins(method_options(stage["method"], stage["options"]))
    return tree


def load(path: Path) -> tuple[Network, Header]:
    """Load a network, in evaluation mode, and its header. Raises `CheckpointError`."""
    header = read_header(path)
    if header.quantized is not None:
        raise CheckpointError(
            f"{path} is a quantised network, whose results are those of its INT8 graph. Give the artifact that"
            f" `edgefg export {path} --to {header.quantized.to} --precision int8` writes"
        )
    try:
        network = network_of(header, safetensors.torch.load_file(path))
    except (RuntimeError, AttributeError, SafetensorError) as exc:
        raise CheckpointError(f"the tensors of {path} do not fit the {header.backbone} of its header: {exc}") from exc
    return network.eval(), header


def network_of(header: Header, tensors: dict[str, torch.Tensor]) -> Network:
    """Build the network of a header, apply the channel plan, and load the tensors."""
    if header.members:
        return Ensemble(
            [
                Member(network_of(member, _below(f"members.{number}.", tensors)), member.input)
                for number, member in enumerate(header.members)
            ]
        )
    network = blank(header, tensors)
    network.load_state_dict(tensors)
    return network


def blank(header: Header, tensors: dict[str, torch.Tensor]) -> Network:
    """Build the network of a header with the shapes of the tensors, but do not load them.

    A quantised network has no batch norms: their widths are taken from the channel plan.
    """
    backbone = build_backbone(header.backbone, len(header.labels))
    network = build(header.method, backbone, header.mean, header.std, header.options)
    apply_channels(network, header.channels)
    known = network.state_dict()
    folded = {
        f"{name}.{leaf}": torch.empty(cast(int, widths["num_features"]))
        for name, widths in header.channels.items()
        for leaf in ("weight", "bias", "running_mean", "running_var")
        if "num_features" in widths and f"{name}.{leaf}" in known
    }
    _resize_to(network, folded | {name: tensor for name, tensor in tensors.items() if name in known})
    return network


def _below(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def channel_plan(pruned: nn.Module, original: nn.Module) -> ChannelPlan:
    """List for every module of ``pruned`` the widths that differ from those of ``original``."""
    originals = dict(original.named_modules())
    plan: ChannelPlan = {}
    for name, module in pruned.named_modules():
        # Plain attributes only: wrappers have some of these as properties of the wrapped module.
        own, before = vars(module), vars(originals[name])
        changed = {
            width: own[width]
            for width in _WIDTHS
            if isinstance(own.get(width), (int, tuple)) and own[width] != before.get(width)
        }
        if changed:
            plan[name] = changed
    return plan


def apply_channels(network: nn.Module, plan: ChannelPlan) -> None:
    """Set the widths of layers to those of a channel plan. The tensors are not changed."""
    modules = dict(network.named_modules())
    for name, widths in plan.items():
        if name not in modules:
            raise CheckpointError(f"the channel plan contains {name}, which this backbone does not have. Update timm")
        for width, value in widths.items():
            if width not in _WIDTHS:
                raise CheckpointError(
                    f"the channel plan sets {width!r} of {name}, which is not one of {', '.join(_WIDTHS)}"
                )
            setattr(modules[name], width, value)


def _resize_to(network: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Give parameters and buffers the stored shapes, so that a pruned network can be loaded strictly."""
    for name, tensor in tensors.items():
        owner_name, _, leaf = name.rpartition(".")
        owner = network.get_submodule(owner_name)
        current = getattr(owner, leaf)
        if current.shape == tensor.shape:
            continue
        empty = torch.empty(tensor.shape, dtype=current.dtype)
        setattr(owner, leaf, nn.Parameter(empty) if isinstance(current, nn.Parameter) else empty)
