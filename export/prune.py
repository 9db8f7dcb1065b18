"""Prune: remove whole channels from a student, then fine-tune what is left.

    edgefg prune runs/x/student.safetensors DATA --teacher runs/x/teacher.safetensors --macs 0.7 --out runs/x

Dependency graph and group Taylor importance are torch-pruning's (Fang et al. 2023, "DepGraph"; Molchanov et al. 2019).
The result is stored as a channel plan and a state dict, never as a pickled module.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

import msgspec
import torch
import torch_pruning
from torch import nn

from edgefg import __version__
from edgefg.errors import CheckpointError, DataError, ExportError, one_line
from edgefg.export.distill_objective import Distillation, read_teachers
from edgefg.export.quiet import quiet
from edgefg.manifest import sha256
from edgefg.recipe import Hardware, Recipe
from edgefg.training.augment import TrainingImages
from edgefg.training.checkpoint import Header, channel_plan, load, rebuild
from edgefg.training.data import load_data
from edgefg.training.loading import training_loader
from edgefg.training.models.backbone import build_backbone, head_of
from edgefg.training.models.network import Batch, Network, NoOptions
from edgefg.training.objective import Objective, TeacherObjective
from edgefg.training.stage import train_and_save

# Far enough, in steps fine enough, to end near the asked-for share; the loop stops there.
_STEPS = 48
_GLOBAL_RATIO = 0.96
_BATCHES_PER_STEP = 2


def prune(
    student_path: Path,
    data_root: Path,
    out: Path,
    recipe: Recipe,
    *,
    macs: float = 0.7,
    round_to: int = 16,
    max_ratio: float = 0.25,
    teacher_path: Path | None = None,
    hardware: Hardware | None = None,
    skip_corrupt: bool = False,
    restart: bool = False,
) -> Path:
    """Prune a student to a share of its multiply-accumulates, fine-tune it, and return ``out/pruned.safetensors``.

    Args:
        student_path: the student's checkpoint.
        data_root: the data it was trained on.
        out: folder for the checkpoint and the run's files.
        recipe: the fine-tuning's settings; the input size stays the student's.
        macs: share of the multiply-accumulates to keep, in (0, 1).
        round_to: channel counts become multiples of this (16 suits INT8 kernels, 8 floating point).
        max_ratio: a layer that has lost this share of its channels loses no more (rounding may exceed it). Without such
            a cap the global ranking empties the first blocks of a compact network (``benchmarks/LOG.md``).
        teacher_path: fine-tune on this teacher's predictions; None fine-tunes on the labels.
        hardware: where to run.
        skip_corrupt: leave unreadable images out.
        restart: begin anew where an unfinished run lies in ``out``.

    Raises:
        CheckpointError, DataError, TrainingError: before the first step.
        ExportError: the network cannot be pruned that far.
    """
    if not (0 < macs < 1 and 0 < max_ratio < 1 and round_to >= 1):
        raise DataError(
            f"--macs {macs:g}, --max-ratio {max_ratio:g} or --round-to {round_to} is out of range:"
            " needed shares between 0 and 1, and at least 1"
        )
    network, header = load(student_path)
    if header.method != "plain":
        raise DataError(
            f"{student_path} is a {header.method} teacher, and only a plain network can be pruned; distil it with"
            " `edgefg distill` and prune the student"
        )
    data = load_data(data_root, header.split, skip_corrupt=skip_corrupt, like=header)
    _, data = Network.prepare(NoOptions(), data)
    recipe = msgspec.structs.replace(recipe, image_size=header.input.height)
    objective: Objective = TeacherObjective(recipe, network, len(header.labels))
    aides: list[nn.Module] = []
    if teacher_path is not None:
        (teacher,) = read_teachers([teacher_path])
        if teacher.header.labels != header.labels:
            raise DataError(f"{teacher_path} and {student_path} have different classes; needed the student's teacher")
        aides = [teacher.network]
        objective = Distillation([teacher], network, recipe)
    torch.manual_seed(recipe.seed)
    images = TrainingImages(data.splits["train"], header.input)
    reached = remove_channels(network, images, objective, recipe, macs=macs, round_to=round_to, max_ratio=max_ratio)
    fresh = Network(build_backbone(header.backbone, len(header.labels)), header.mean, header.std)
    header = msgspec.structs.replace(
        header,
        kind="pruned",
        channels=channel_plan(network, fresh),
        parent=sha256(student_path),
        recipe=f"{header.recipe}; prune to {reached:.3f} of MACs (asked {macs:g}, at most {max_ratio:g} of a layer),"
        f" channels ×{round_to}, teacher {sha256(teacher_path)[:12] if teacher_path else 'none'}",
        validation=None,
        edgefg=__version__,
    )
    _prove_rebuild(network, header)
    return train_and_save(
        network, header, data, recipe, objective, out, hardware=hardware, aides=aides, restart=restart
    )


def _endless(images: TrainingImages, recipe: Recipe) -> Iterator[Batch]:
    """Yield augmented batches for ever, in another order each time round."""
    for turn in count():
        yield from training_loader(images, recipe, workers=0, seed=recipe.seed + turn)


def _prove_rebuild(network: Network, header: Header) -> None:
    """Raise `ExportError` unless the channel plan rebuilds this very network; better now than after fine-tuning."""
    image = torch.zeros(1, header.input.height, header.input.width, 3, dtype=torch.uint8)
    try:
        rebuilt = rebuild(header, network.state_dict()).eval()
        with torch.inference_mode():
            same = torch.equal(rebuilt(image), network.eval()(image))
    except (AttributeError, RuntimeError, CheckpointError) as exc:
        raise ExportError(f"a pruned {header.backbone} cannot be rebuilt from its plan: {one_line(exc)[:200]}") from exc
    if not same:
        raise ExportError(
            f"a pruned {header.backbone} rebuilt from its plan gives other logits; prune another backbone"
        )


def remove_channels(
    network: Network,
    images: TrainingImages,
    objective: Objective,
    recipe: Recipe,
    *,
    macs: float,
    round_to: int,
    max_ratio: float,
) -> float:
    """Remove channels, least important groups first, until ``macs`` of the multiply-accumulates are left.

    Importance is measured anew before every step. The step that would overshoot is the last one: the network ends at or
    below the target. Returns the share that is left.

    Raises:
        ExportError: the per-layer cap was reached before the target.
    """
    height, width = recipe.image_size, recipe.image_size
    example = torch.zeros(1, 3, height, width)
    body = network.backbone
    before, _ = torch_pruning.utils.count_ops_and_params(copy.deepcopy(body), example)
    with quiet():
        pruner = torch_pruning.pruner.BasePruner(
            body,
            example,
            importance=torch_pruning.importance.GroupTaylorImportance(),
            global_pruning=True,
            pruning_ratio=_GLOBAL_RATIO,
            max_pruning_ratio=max_ratio,
            iterative_steps=_STEPS,
            round_to=round_to,
            ignored_layers=[head_of(body)],
        )
    batches = _endless(images, recipe)
    share = 1.0
    for _ in range(_STEPS):
        network.zero_grad()
        network.train()
        for batch in islice(batches, _BATCHES_PER_STEP):
            loss, _ = objective(network, batch)
            loss.backward()  # type: ignore[no-untyped-call]
        network.eval()
        pruner.step()
        left, _ = torch_pruning.utils.count_ops_and_params(copy.deepcopy(body), example)
        share = left / before
        if share <= macs:
            return float(share)
    raise ExportError(
        f"with at most {max_ratio:.0%} of each layer's channels removed, {share:.2f} of the multiply-accumulates are"
        f" left; asked were {macs:g}: raise --max-ratio or ask for more"
    )
