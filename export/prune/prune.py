"""Structured pruning: remove channels from a student, then fine-tune it, in one round or several.

    edgefg prune runs/x/student.safetensors DATA --teacher runs/x/teacher.safetensors --macs 0.7 --out runs/x

The network is saved before each fine-tuning, so that a killed run resumes with the same channels. The result is stored
as a channel plan and a state dict, never as a pickled module.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import torch
from lightning_fabric.utilities.rank_zero import rank_zero_only
from msgspec.structs import replace
from torch import nn

from edgefg import __version__
from edgefg.artifact.hashes import sha256
from edgefg.artifact.stages import PruneStage, RelativeCost, versions_of
from edgefg.data import ImageDataset, load_dataset
from edgefg.data.calibration import choose_balanced, read_calibration
from edgefg.errors import CheckpointError, DataError, ExportError, TrainingError, one_line
from edgefg.export.distill.objective import DistillationObjective, load_teachers, open_teacher_cache
from edgefg.export.prune.channels import remove_channels
from edgefg.export.prune.cost import CostModel, LatencyMeter
from edgefg.log import get_logger
from edgefg.settings.distillation import DistillationConfig
from edgefg.settings.hardware import Hardware
from edgefg.settings.options import with_options
from edgefg.settings.pruning import PruningConfig
from edgefg.settings.training import TrainingConfig
from edgefg.training.checkpoint import SCHEMA, Header, channel_plan, load, network_of, read_header, run_difference, save
from edgefg.training.data.augment import TrainingImages
from edgefg.training.data.loader import training_loader
from edgefg.training.loop.stage import train_and_save
from edgefg.training.models.backbone import build_backbone
from edgefg.training.models.network import Batch, Network, NoOptions
from edgefg.training.objective import Objective, TeacherObjective

_log = get_logger(__name__)

ROUNDS = "pruned.rounds"
"""Folder, beside the checkpoint, with the rounds of an unfinished run."""
_BATCHES_PER_STEP = 2
# Enough for INT8 networks of which only the latency is measured: their ranges do not matter.
_CALIBRATION_IMAGES = 8


class _Run(NamedTuple):
    """A run of pruning whose arguments are checked."""

    student: Network
    header: Header
    """The student's."""
    stage: PruneStage
    data: ImageDataset
    objective: Objective
    frozen_modules: list[nn.Module]
    out: Path
    hardware: Hardware


def prune(
    student_path: Path,
    data: Path | ImageDataset,
    out: Path,
    config: TrainingConfig,
    pruning: PruningConfig | None = None,
    *,
    teacher_path: Path | None = None,
    distillation: DistillationConfig | None = None,
    teacher_cache: Path | None = None,
    hardware: Hardware | None = None,
    skip_corrupt: bool = False,
    restart: bool = False,
) -> Path:
    """Prune a student to a share of its cost and fine-tune it. Returns the path of ``out/pruned.safetensors``.

    Args:
        student_path: checkpoint of the student.
        data: the data that it was trained on: a path, or loaded data.
        out: folder for the checkpoint and the run's files.
        config: settings of the fine-tuning. The image size stays the student's.
        pruning: which channels are removed, and how many. Default: 70 % of the multiply-accumulates are kept.
        teacher_path: teacher whose predictions are learned in the fine-tuning. None: the labels are.
        distillation: what to learn from the teacher. Maps are ignored: the pruned network's are narrower.
        teacher_cache: see `edgefg.export.distill.distill.distill`.
        hardware: where to run.
        skip_corrupt: leave unreadable images out instead of raising.
        restart: start again even if ``out`` holds an unfinished run.

    Raises:
        CheckpointError, DataError, TrainingError: before the first step.
        ExportError: the network cannot be pruned that far, or cannot be rebuilt from its channel plan.
    """
    pruning, hardware = _checked(pruning or PruningConfig()), hardware or Hardware()
    if pruning.rounds > 1 and hardware.devices > 1:
        raise DataError(
            f"--rounds {pruning.rounds} and --devices {hardware.devices} exclude each other: channels are removed"
            " by one process. Use --devices 1 or --rounds 1"
        )
    student, header = load(student_path)
    if header.method != "plain":
        raise DataError(
            f"{student_path} is a {header.method} teacher, but only plain networks can be pruned. Distil it with"
            " `edgefg distill`, and prune the student"
        )
    _, data = Network.prepare(NoOptions(), load_dataset(data, expected=header, skip_corrupt=skip_corrupt))
    config = with_options(config, image_size=header.input.height)
    distillation = (distillation or DistillationConfig()).without_maps().resolved()
    objective, teachers = _objective_of(
        student, header, config, student_path, teacher_path, distillation, teacher_cache
    )
    stage = PruneStage(
        pruning=pruning,
        training=config,
        distillation=distillation if teacher_path else None,
        parents=(sha256(student_path), *([sha256(teacher_path)] if teacher_path else [])),
        versions=versions_of("torch", "timm", "torch-pruning"),
    )
    run = _Run(student, header, stage, data, objective, teachers, out, hardware)
    if restart and rank_zero_only.rank == 0:
        shutil.rmtree(out / ROUNDS, ignore_errors=True)
    finished = out / "pruned.safetensors"
    # From a finished checkpoint only the channel plan is taken: `train_and_save` checks whether it is the same run.
    network, header = _reload(run, finished) if finished.exists() and not restart else _run_rounds(run)
    path = train_and_save(
        network, header, data, objective, out, hardware=hardware, frozen_modules=teachers, restart=restart
    )
    if rank_zero_only.rank == 0:
        shutil.rmtree(out / ROUNDS, ignore_errors=True)
    return path


def _checked(pruning: PruningConfig) -> PruningConfig:
    """Return the settings. Raises `DataError` if a value is out of range: constructors do not check that."""
    pruning = with_options(pruning)
    pruning.target()
    return pruning


def _objective_of(
    student: Network,
    header: Header,
    config: TrainingConfig,
    student_path: Path,
    teacher_path: Path | None,
    distillation: DistillationConfig,
    teacher_cache: Path | None,
) -> tuple[Objective, list[nn.Module]]:
    """Return the objective of the fine-tuning and of Taylor importance, and the frozen networks that it uses."""
    if teacher_path is None:
        return TeacherObjective(config, student, len(header.labels)), []
    (teacher,) = load_teachers([teacher_path])
    if teacher.header.labels != header.labels:
        raise DataError(f"{teacher_path} and {student_path} have different classes. Use the student's teacher")
    cache = None if teacher_cache is None else open_teacher_cache(teacher_cache, [teacher], distillation)
    return DistillationObjective([teacher], student, config, distillation, cache), [teacher.network]


def _header_of(run: _Run, network: Network, remaining: RelativeCost | None) -> Header:
    """Return the header of a pruned network."""
    student = run.header
    original = Network(build_backbone(student.backbone, len(student.labels)), student.mean, student.std)
    return replace(
        student,
        schema=SCHEMA,
        kind="pruned",
        channels=channel_plan(network, original),
        parent=run.stage.parents[0],
        stages=(*student.stages, replace(run.stage, remaining=remaining)),
        validation=None,
        edgefg=__version__,
    )


def _reload(run: _Run, path: Path) -> tuple[Network, Header]:
    """Load an earlier network of this run. Its header has the stored channels and costs, and the present settings."""
    network, stored = load(path)
    last = stored.stages[-1] if stored.stages else None
    header = _header_of(run, run.student, last.remaining if isinstance(last, PruneStage) else None)
    return network, replace(header, channels=stored.channels)


def _run_rounds(run: _Run) -> tuple[Network, Header]:
    """Prune to the target in rounds. Returns the network of the last round, which is not fine-tuned yet."""
    network = copy.deepcopy(run.student)
    # Created on first use: a resumed run may not need it.
    cost_model: CostModel | None = None
    pruning = run.stage.pruning
    _, share = pruning.target()
    for number in range(1, pruning.rounds + 1):
        folder = run.out / ROUNDS / str(number)
        cut = folder / "cut.safetensors"
        if cut.exists():
            network, header = _resume_round(run, cut)
        else:
            cost_model = cost_model or _cost_model_of(run)
            header = _prune_round(run, network, cost_model, 1 - (1 - share) * number / pruning.rounds, cut)
        stage = header.stages[-1]
        assert isinstance(stage, PruneStage)
        if stage.remaining is not None:
            _log.info("round %d of %d, left: %s", number, pruning.rounds, stage.remaining.render())
        if number < pruning.rounds:
            short = replace(stage, training=with_options(stage.training, epochs=pruning.round_epochs))
            header = replace(header, stages=(*header.stages[:-1], short))
            path = train_and_save(
                network,
                header,
                run.data,
                run.objective,
                folder,
                hardware=run.hardware,
                frozen_modules=run.frozen_modules,
            )
            network, _ = load(path)
    return network, header


def _resume_round(run: _Run, cut: Path) -> tuple[Network, Header]:
    """Load the network of an unfinished run. Raises `TrainingError` if that run is another one."""
    network, header = _reload(run, cut)
    if difference := run_difference(read_header(cut), header):
        raise TrainingError(
            f"{cut} is of an unfinished run with {difference}. Give another --out, or --restart to start again"
        )
    return network, header


def _prune_round(run: _Run, network: Network, cost_model: CostModel, share: float, path: Path) -> Header:
    """Remove channels until a share of the cost is left, and save the network. Returns its header."""
    # Training of an earlier round left them on its device.
    for module in (*run.frozen_modules, run.objective):
        module.cpu()
    torch.manual_seed(run.stage.training.schedule.seed)
    batches = _endless(TrainingImages(run.data.splits["train"], run.header.input), run.stage.training)

    def fill_gradients(network: Network) -> None:
        network.train()
        for batch in islice(batches, _BATCHES_PER_STEP):
            loss, _ = run.objective(network, batch)
            loss.backward()

    remaining = remove_channels(network, run.stage.pruning, cost_model, share, fill_gradients)
    header = _header_of(run, network, remaining)
    _check_rebuild(network, header)
    if rank_zero_only.rank == 0:
        save(path, network, header)
    return header


def _cost_model_of(run: _Run) -> CostModel:
    """Return the cost model of a run. If the target is latency, the student is exported."""
    spec, pruning = run.header.input, run.stage.pruning
    if pruning.latency is None:
        return CostModel(run.student, spec)
    inputs = None
    if pruning.latency_precision == "int8":
        seed = run.stage.training.schedule.seed
        paths = choose_balanced(run.data.splits["train"], _CALIBRATION_IMAGES, seed, run.data.conditions)
        inputs = read_calibration(paths, spec).inputs
    return CostModel(run.student, spec, LatencyMeter(run.student, spec, inputs))


def _endless(images: TrainingImages, config: TrainingConfig) -> Iterator[Batch]:
    """Yield augmented batches for ever, in another order in each epoch."""
    for epoch in count():
        yield from training_loader(images, config, workers=0, seed=config.schedule.seed + epoch)


def _check_rebuild(network: Network, header: Header) -> None:
    """Raise `ExportError` unless the channel plan rebuilds the network: better now than after the fine-tuning."""
    image = torch.zeros(1, header.input.height, header.input.width, 3, dtype=torch.uint8)
    try:
        rebuilt = network_of(header, network.state_dict()).eval()
        with torch.inference_mode():
            same = torch.equal(rebuilt(image), network.eval()(image))
    except (AttributeError, RuntimeError, CheckpointError) as exc:
        raise ExportError(
            f"a pruned {header.backbone} cannot be rebuilt from its channel plan ({one_line(exc)[:200]}). Prune another"
            " backbone"
        ) from exc
    if not same:
        raise ExportError(
            f"a pruned {header.backbone} that is rebuilt from its channel plan gives other logits. Prune another"
            " backbone"
        )
