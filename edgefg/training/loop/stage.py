"""A training stage: check the run, train, write the checkpoint and delete the resume state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from lightning_fabric.utilities.rank_zero import rank_zero_only
from msgspec.structs import replace
from torch import nn

from edgefg.artifact.manifest import Accuracy
from edgefg.data import ImageDataset
from edgefg.errors import TrainingError
from edgefg.log import get_logger
from edgefg.settings.hardware import Hardware
from edgefg.training.checkpoint import Header, read_header, run_difference, save
from edgefg.training.data.mix import evaluating
from edgefg.training.loop.fit import fit
from edgefg.training.models.network import TrainableNetwork
from edgefg.training.objective import Objective

_log = get_logger(__name__)


def train_and_save(
    network: TrainableNetwork,
    header: Header,
    data: ImageDataset,
    objective: Objective,
    out: Path,
    *,
    new_modules: Sequence[nn.Module] = (),
    hardware: Hardware | None = None,
    frozen_modules: Sequence[nn.Module] = (),
    restart: bool = False,
) -> Path:
    """Train a network and write ``out/<header.kind>.safetensors``. Returns that path.

    A finished checkpoint of the same run is returned as it is. See `edgefg.training.loop.fit.fit` for the arguments.

    Args:
        network: the network.
        header: header of the checkpoint. The validation accuracy is filled in.
        data: the data.
        objective: loss of a batch.
        out: folder for the checkpoint and the run's files.
        new_modules: untrained modules.
        hardware: where to run.
        frozen_modules: networks that the objective uses.
        restart: delete a finished checkpoint, or the state of an unfinished run, and start again.

    Raises:
        TrainingError: the backbone does not accept the image size, the folder cannot be written or holds another run,
            or see `fit`.
    """
    path = out / f"{header.kind}.safetensors"
    state = out / f"{header.kind}.resume.safetensors"
    if path.exists() and not restart:
        if difference := run_difference(read_header(path), header):
            raise TrainingError(
                f"{path} exists, and was made with {difference}. Give another --out, or --restart to replace it"
            )
        _log.info("%s exists, made from the same data with the same settings", path)
        return path
    _check_sizes(network, header)
    freeze_epochs = header.training.fine_tuning.freeze_epochs
    if freeze_epochs and not new_modules:
        raise TrainingError(
            f"--freeze-epochs {freeze_epochs} trains new layers only, and the starting weights leave none. Remove it"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        if restart:
            state.unlink(missing_ok=True)
        scores = fit(
            network,
            header,
            data,
            objective,
            out,
            new_modules=new_modules,
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
def _check_sizes(network: nn.Module, header: Header) -> None:
    """Raise `TrainingError` unless the network accepts the smallest and largest training crops, and test images."""
    config = header.training
    device = next(network.parameters()).device
    for size in sorted({config.size_at(0), config.size_at(config.schedule.epochs), header.input.height}):
        try:
            with evaluating(network):  # an empty image must not change the statistics of the norms
                network(torch.zeros(1, size, size, 3, dtype=torch.uint8, device=device))
        except (RuntimeError, AssertionError) as exc:  # raised by torch's layers, and by timm's checks of the size
            reason = str(exc).strip().partition("\n")[0]
            raise TrainingError(
                f"{header.backbone} does not accept images of {size} px ({reason}). Use the size that it was built for,"
                " or a larger one: --image-size 224 suits most backbones"
            ) from exc
