"""Prune: remove whole channels from a student, then fine-tune what is left; in rounds, where that is asked for.

    edgefg prune runs/x/student.safetensors DATA --teacher runs/x/teacher.safetensors --macs 0.7 --out runs/x

What was removed is written down before any fine-tuning, so that a run that was killed goes on with the same channels.
The result is stored as a channel plan and a state dict, never as a pickled module.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
from lightning_fabric.utilities.rank_zero import rank_zero_only
from msgspec.structs import replace
from torch import nn

from edgefg import __version__
from edgefg.artifact.hashes import sha256
from edgefg.data import ImageDataset, load_dataset
from edgefg.data.calibration import choose_balanced, read_calibration
from edgefg.errors import CheckpointError, DataError, ExportError, TrainingError, one_line
from edgefg.export.distill.objective import Distillation, open_teacher_cache, read_teachers
from edgefg.export.prune.channels import remove_channels
from edgefg.export.prune.cost import Stopwatch, Yardstick
from edgefg.settings.distillation import DistillationConfig
from edgefg.settings.hardware import Hardware
from edgefg.settings.options import with_options
from edgefg.settings.pruning import PruningConfig
from edgefg.settings.training import TrainingConfig
from edgefg.training.checkpoint import Header, channel_plan, load, read_header, rebuild, save
from edgefg.training.data.augment import TrainingImages
from edgefg.training.data.loader import training_loader
from edgefg.training.loop.stage import train_and_save
from edgefg.training.models.backbone import build_backbone
from edgefg.training.models.network import Batch, Network, NoOptions
from edgefg.training.objective import Objective, TeacherObjective

ROUNDS = "pruned.rounds"
"""Folder, beside the checkpoint, of an unfinished run's rounds."""
_BATCHES_PER_STEP = 2
# Of INT8 networks whose time alone matters: what the ranges are is of no account.
_CALIBRATION_IMAGES = 8


class _Job(NamedTuple):
    """A run of pruning, checked."""

    student: Network
    header: Header
    """The student's."""
    data: ImageDataset
    config: TrainingConfig
    pruning: PruningConfig
    objective: Objective
    frozen_modules: list[nn.Module]
    out: Path
    hardware: Hardware
    request: str
    """What was asked for, in words; part of the run's identity."""
    parent: str
    say: Callable[[str], None]


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
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Prune a student to a share of its size or time, fine-tune it, and return ``out/pruned.safetensors``.

    Args:
        student_path: the student's checkpoint.
        data: the data it was trained on, as a path, or loaded by `load_dataset`.
        out: folder for the checkpoint and the run's files.
        config: the fine-tuning's settings; the input size stays the student's.
        pruning: which channels, and how many; 70 % of the multiply-accumulates where left out.
        teacher_path: fine-tune on this teacher's predictions; None fine-tunes on the labels.
        distillation: what to learn from the teacher. Feature maps are ignored: the pruned network's are narrower.
        teacher_cache: see `edgefg.export.distill.distill.distill`.
        hardware: where to run.
        skip_corrupt: leave unreadable images out.
        restart: begin anew where an unfinished run lies in ``out``.
        progress: called with one line for each step.

    Raises:
        CheckpointError, DataError, TrainingError: before the first step.
        ExportError: the network cannot be pruned that far, or not rebuilt from its plan.
    """
    pruning, hardware = _checked(pruning or PruningConfig()), hardware or Hardware()
    if pruning.rounds > 1 and hardware.devices > 1:
        raise DataError(
            f"--rounds {pruning.rounds} and --devices {hardware.devices} were given, but channels are removed between"
            " the rounds by one process; needed --devices 1 or --rounds 1"
        )
    student, header = load(student_path)
    if header.method != "plain":
        raise DataError(
            f"{student_path} is a {header.method} teacher, and only a plain network can be pruned; distil it with"
            " `edgefg distill` and prune the student"
        )
    _, data = Network.prepare(NoOptions(), load_dataset(data, expected=header, skip_corrupt=skip_corrupt))
    config = with_options(config, image_size=header.input.height)
    predictions = (distillation or DistillationConfig()).without_maps()
    objective, frozen_modules = _objective_of(
        student, header, config, student_path, teacher_path, predictions, teacher_cache
    )
    job = _Job(
        student=student,
        header=header,
        data=data,
        config=config,
        pruning=pruning,
        objective=objective,
        frozen_modules=frozen_modules,
        out=out,
        hardware=hardware,
        request=", ".join([_words(pruning, teacher_path), *(predictions.words() if teacher_path else [])]),
        parent=sha256(student_path),
        say=progress or (lambda _: None),
    )
    if restart and rank_zero_only.rank == 0:
        shutil.rmtree(out / ROUNDS, ignore_errors=True)
    finished = out / "pruned.safetensors"
    # Of a finished run only the widths are taken over: whether it is this very run is for `train_and_save` to say.
    network, header = _adopt(job, finished) if finished.exists() and not restart else _run_rounds(job)
    path = train_and_save(
        network, header, data, config, objective, out, hardware=hardware, frozen_modules=frozen_modules, restart=restart
    )
    if rank_zero_only.rank == 0:
        shutil.rmtree(out / ROUNDS, ignore_errors=True)
    return path


def _checked(pruning: PruningConfig) -> PruningConfig:
    """Return the settings, or raise `DataError` where one is out of range: structs made by hand are not checked."""
    try:
        pruning = msgspec.convert(msgspec.structs.asdict(pruning), PruningConfig)
    except msgspec.ValidationError as exc:
        raise DataError(f"cannot prune: {exc}") from exc
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
    """Return the loss of the fine-tuning, and by which Taylor importance is measured, with the networks it uses."""
    if teacher_path is None:
        return TeacherObjective(config, student, len(header.labels)), []
    (teacher,) = read_teachers([teacher_path])
    if teacher.header.labels != header.labels:
        raise DataError(f"{teacher_path} and {student_path} have different classes; needed the student's teacher")
    kept = None if teacher_cache is None else open_teacher_cache(teacher_cache, [teacher], distillation)
    return Distillation([teacher], student, config, distillation, kept), [teacher.network]


def _words(pruning: PruningConfig, teacher_path: Path | None) -> str:
    """Say what was asked for."""
    measure, share = pruning.target()
    of = f"{pruning.latency_precision} latency" if measure == "latency" else measure
    ranking = "uniform" if pruning.uniform else "isomorphic" if pruning.isomorphic else "global"
    rounds = f", {pruning.rounds} rounds of {pruning.round_epochs} epochs" if pruning.rounds > 1 else ""
    teacher = sha256(teacher_path)[:12] if teacher_path else "none"
    return (
        f"prune to {share:g} of {of} by {pruning.importance}, {ranking}, at most {pruning.max_ratio:g} of a layer,"
        f" channels ×{pruning.round_to}{rounds}, teacher {teacher}"
    )


def _header_of(job: _Job, network: Network, left: str) -> Header:
    """Return the header of a pruned network; ``left`` says what is left of it."""
    unpruned = Network(build_backbone(job.header.backbone, len(job.header.labels)), job.header.mean, job.header.std)
    return replace(
        job.header,
        kind="pruned",
        channels=channel_plan(network, unpruned),
        parent=job.parent,
        recipe=f"{job.header.recipe}; {job.request}; left: {left}",
        validation=None,
        edgefg=__version__,
    )


def _adopt(job: _Job, path: Path) -> tuple[Network, Header]:
    """Load an earlier network of this run; the header has its widths and what is left, and else what is asked now."""
    network, stored = load(path)
    left = stored.recipe.rpartition("; left: ")[2].partition(" {")[0]
    header = _header_of(job, job.student, left)
    return network, replace(header, channels=stored.channels)


def _run_rounds(job: _Job) -> tuple[Network, Header]:
    """Go to the target in rounds; return the network of the last one, which is still to be fine-tuned."""
    network = copy.deepcopy(job.student)
    # Made on first use: a resumed run may need none.
    yardstick: Yardstick | None = None
    _, share = job.pruning.target()
    rounds = job.pruning.rounds
    for number in range(1, rounds + 1):
        folder = job.out / ROUNDS / str(number)
        cut = folder / "cut.safetensors"
        if cut.exists():
            network, header = _reopen(job, cut)
        else:
            yardstick = yardstick or _yardstick_of(job)
            header = _cut(job, network, yardstick, 1 - (1 - share) * number / rounds, cut)
        job.say(f"round {number} of {rounds}, left: {header.recipe.rpartition('; left: ')[2]}")
        if number < rounds:
            short = with_options(job.config, epochs=job.pruning.round_epochs)
            path = train_and_save(
                network,
                header,
                job.data,
                short,
                job.objective,
                folder,
                hardware=job.hardware,
                frozen_modules=job.frozen_modules,
            )
            network, _ = load(path)
    return network, header


def _reopen(job: _Job, cut: Path) -> tuple[Network, Header]:
    """Load what an unfinished run removed. Raises `TrainingError` where that run is another one."""
    network, header = _adopt(job, cut)
    if read_header(cut) != header:
        raise TrainingError(
            f"{cut} is of an unfinished run with other data or settings; give another --out, or --restart to begin anew"
        )
    return network, header


def _cut(job: _Job, network: Network, yardstick: Yardstick, share: float, path: Path) -> Header:
    """Remove channels from a network until a share is left, and write it down; return its header."""
    # A round of training left them where it ran.
    for module in (*job.frozen_modules, job.objective):
        if isinstance(module, nn.Module):
            module.cpu()
    torch.manual_seed(job.config.schedule.seed)
    batches = _endless(TrainingImages(job.data.splits["train"], job.header.input), job.config)

    def fill_gradients(network: Network) -> None:
        network.train()
        for batch in islice(batches, _BATCHES_PER_STEP):
            loss, _ = job.objective(network, batch)
            loss.backward()  # type: ignore[no-untyped-call]

    left = remove_channels(network, job.pruning, yardstick, share, fill_gradients, job.say)
    header = _header_of(job, network, left.render())
    _prove_rebuild(network, header)
    if rank_zero_only.rank == 0:
        save(path, network, header)
    return header


def _yardstick_of(job: _Job) -> Yardstick:
    """Return what measures this run; it exports the student where the target is its latency."""
    if job.pruning.latency is None:
        return Yardstick(job.student, job.header.input)
    inputs = None
    if job.pruning.latency_precision == "int8":
        paths = choose_balanced(
            job.data.splits["train"], _CALIBRATION_IMAGES, job.config.schedule.seed, job.data.conditions
        )
        inputs = read_calibration(paths, job.header.input).inputs
    return Yardstick(job.student, job.header.input, Stopwatch(job.student, job.header.input, inputs))


def _endless(images: TrainingImages, config: TrainingConfig) -> Iterator[Batch]:
    """Yield augmented batches for ever, in another order each time round."""
    for turn in count():
        yield from training_loader(images, config, workers=0, seed=config.schedule.seed + turn)


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
