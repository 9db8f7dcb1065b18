"""What every training stage shares: fit a network on checked data, then leave a checkpoint and no state."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch
from lightning_fabric.utilities.rank_zero import rank_zero_only
from msgspec.structs import replace
from torch import nn

from edgefg.artifact.manifest import Accuracy
from edgefg.data import ImageDataset
from edgefg.errors import TrainingError
from edgefg.settings.hardware import Hardware
from edgefg.settings.training import TrainingConfig
from edgefg.training.checkpoint import Header, read_header, save
from edgefg.training.data.mix import evaluating
from edgefg.training.loop.fit import fit
from edgefg.training.objective import Objective


def train_and_save(
    network: nn.Module,
    header: Header,
    data: ImageDataset,
    config: TrainingConfig,
    objective: Objective,
    out: Path,
    *,
    new_modules: Sequence[nn.Module] = (),
    hardware: Hardware | None = None,
    frozen_modules: Sequence[nn.Module] = (),
    restart: bool = False,
) -> Path:
    """Train ``network`` and write ``out/<header.kind>.safetensors``; return that path.

    The header's config and validation accuracy are filled in. A finished checkpoint of the very same run is returned as
    it is; ``restart`` throws it, or an unfinished run's state, away. See `edgefg.training.loop.fit.fit` for the rest.

    Raises:
        TrainingError: the backbone takes no images of the config's sizes, the folder cannot be written or holds another
            run, or see `fit`.
    """
    stage = header.kind
    path = out / f"{stage}.safetensors"
    state = out / f"{stage}.resume.safetensors"
    header = replace(header, recipe=f"{header.recipe} {msgspec.json.encode(config).decode()}".strip())
    if path.exists() and not restart:
        _same_run(path, header)
        print(f"{path} is there already, from the same data and settings", file=sys.stderr)
        return path
    _need_sizes(network, header, config)
    if config.fine_tuning.freeze_epochs and not new_modules:
        raise TrainingError(
            f"--freeze-epochs {config.fine_tuning.freeze_epochs} trains new layers only, and the starting weights leave"
            " none. Remove it"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        if restart:
            state.unlink(missing_ok=True)
        scores = fit(
            network,
            data.splits,
            header.input,
            config,
            objective,
            out,
            stage=stage,
            fingerprint=_identity(header),
            new_modules=new_modules,
            boxes=data.boxes,
            hardware=hardware,
            frozen_modules=frozen_modules,
        )
        validation = Accuracy.of(scores, f"val of {data.root.resolve().name}") if scores else None
        if rank_zero_only.rank == 0:
            save(path, network, replace(header, validation=validation))
            state.unlink(missing_ok=True)
    except OSError as exc:
        raise TrainingError(f"cannot write below {out}: {exc}") from exc
    return path


@torch.no_grad()
def _need_sizes(network: nn.Module, header: Header, config: TrainingConfig) -> None:
    """Raise `TrainingError` unless the network takes the smallest images of training, and those of the test."""
    device = next(network.parameters()).device
    for size in sorted({config.size_at(0), config.size_at(config.schedule.epochs), header.input.height}):
        try:
            with evaluating(network):  # the norms' statistics must not learn from an empty image
                network(torch.zeros(1, size, size, 3, dtype=torch.uint8, device=device))
        except (RuntimeError, AssertionError) as exc:  # what torch's layers and timm's checks of a size raise
            reason = str(exc).strip().partition("\n")[0]
            raise TrainingError(
                f"{header.backbone} takes no images of {size} px ({reason}); needed the size that it is built for, or"
                " a larger one: --image-size 224 suits most backbones"
            ) from exc


def _identity(header: Header) -> str:
    """Digest everything that a run depends on: data, settings, teacher, parent, widths."""
    return hashlib.sha256(msgspec.json.encode(replace(header, validation=None))).hexdigest()


def _same_run(path: Path, header: Header) -> None:
    """Raise `TrainingError` unless the finished checkpoint is of this very run."""
    if _identity(read_header(path)) != _identity(header):
        raise TrainingError(
            f"{path} is there already, from other data or settings; give another --out, or --restart to replace it"
        )
