"""Pruning as a stage: rounds, resumption, the command line. What is removed is tested in test_channels.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from edgefg.artifact.hashes import sha256
from edgefg.artifact.stages import PruneStage
from edgefg.data import load_dataset
from edgefg.errors import DataError, TrainingError
from edgefg.export.prune import prune as stage
from edgefg.export.prune.cost import LatencyMeter
from edgefg.export.prune.prune import ROUNDS, prune
from edgefg.preprocess import InputSpec
from edgefg.settings.hardware import Hardware
from edgefg.settings.pruning import PruningConfig
from edgefg.settings.split import SplitSpec
from edgefg.settings.training import Schedule, TrainingConfig
from edgefg.training.checkpoint import SCHEMA, Header, load, read_header, save
from edgefg.training.models.backbone import build_backbone
from edgefg.training.models.network import Network
from tests.conftest import Run
from tests.synthetic import write_dataset

HERE = Hardware(accelerator="cpu", workers=0)
CONFIG = TrainingConfig(image_size=32, schedule=Schedule(epochs=1, batch_size=16))
IN_ROUNDS = PruningConfig(macs=0.8, round_to=4, rounds=2)


@pytest.fixture(scope="module")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("birds"), classes=2, per_class=20, size=40, seed=2)


@pytest.fixture(scope="module")
def student(birds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    data = load_dataset(birds)
    network = Network(build_backbone("test_efficientnet", 2), (127.0,) * 3, (60.0,) * 3).eval()
    header = Header(
        schema=SCHEMA, kind="student", method="plain", backbone="test_efficientnet", labels=data.labels,
        input=InputSpec(height=32, width=32), mean=(127.0,) * 3, std=(60.0,) * 3, dataset=data.fingerprint,
        split=SplitSpec(), teacher="e" * 64, edgefg="0",
    )  # fmt: skip
    path = tmp_path_factory.mktemp("student") / "student.safetensors"
    save(path, network, header)
    return path


@pytest.fixture(scope="module")
def in_rounds(student: Path, birds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed; not to be spoilt."""
    out = tmp_path_factory.mktemp("whole")
    prune(student, birds, out, CONFIG, IN_ROUNDS, teacher_path=student, hardware=HERE)
    return out


def equal(path: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same network and header."""
    (a, header), (b, other_header) = load(path), load(other)
    return header == other_header and all(
        torch.equal(tensor, b.state_dict()[name]) for name, tensor in a.state_dict().items()
    )


def share_of(line: str) -> float:
    return float(line.partition("left: ")[2].split()[0])


def test_rounds_go_equal_ways_and_leave_one_checkpoint(
    in_rounds: Path, student: Path, birds: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = in_rounds.with_name("again")
    caplog.set_level("INFO", "edgefg")
    prune(student, birds, out, CONFIG, IN_ROUNDS, teacher_path=student, hardware=HERE)
    assert equal(out / "pruned.safetensors", in_rounds / "pruned.safetensors")
    rounds = [line for line in caplog.messages if line.startswith("round ")]
    assert [line.partition(",")[0] for line in rounds] == ["round 1 of 2", "round 2 of 2"]
    assert share_of(rounds[1]) <= 0.8 < share_of(rounds[0]) <= 0.9
    header = read_header(out / "pruned.safetensors")
    assert header.parent == sha256(student)
    record = header.stages[-1]
    assert isinstance(record, PruneStage)
    assert (record.pruning, record.training) == (IN_ROUNDS, CONFIG)
    assert record.parents == (sha256(student), sha256(student))
    assert record.remaining is not None
    assert rounds[1].endswith(f"left: {record.remaining.render()}")
    assert not (out / ROUNDS).exists()


class Killed(Exception):
    pass


@pytest.mark.parametrize("killed_at", [1, 2, 3, 4])
def test_a_killed_run_goes_on_where_it_was(
    killed_at: int, in_rounds: Path, student: Path, birds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before its first, second, third or fourth piece of work: removal, training, removal, training."""
    done: list[str] = []

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **others: Any) -> Any:
            if len(done) == killed_at - 1 and "resumed" not in done:
                raise Killed
            done.append(name)
            return function(*args, **others)

        return call

    for name in ("remove_channels", "train_and_save"):
        monkeypatch.setattr(stage, name, counted(name, getattr(stage, name)))
    options: dict[str, Any] = {"teacher_path": student, "hardware": HERE}
    with pytest.raises(Killed):
        prune(student, birds, tmp_path, CONFIG, IN_ROUNDS, **options)
    before = list(done)
    done.append("resumed")
    path = prune(student, birds, tmp_path, CONFIG, IN_ROUNDS, **options)
    assert done[len(before) + 1 :].count("remove_channels") == 2 - before.count("remove_channels")
    assert equal(path, in_rounds / "pruned.safetensors")
    assert not (tmp_path / ROUNDS).exists()


def test_another_runs_rounds_are_not_taken_over(
    student: Path, birds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(stage, "train_and_save", lambda *args, **others: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            prune(student, birds, tmp_path, CONFIG, PruningConfig(macs=0.95, round_to=8), hardware=HERE)
    other = PruningConfig(macs=0.9, round_to=8)
    with pytest.raises(TrainingError, match=r"is of an unfinished run with macs 0\.95, now 0\.9"):
        prune(student, birds, tmp_path, CONFIG, other, hardware=HERE)
    path = prune(student, birds, tmp_path, CONFIG, other, hardware=HERE, restart=True)
    record = read_header(path).stages[-1]
    assert isinstance(record, PruneStage)
    assert record.pruning == other


def test_a_measured_share_is_not_measured_again(
    student: Path, birds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Times are never the same twice: a finished or killed run keeps the widths that it chose."""
    found = iter([1.0, 0.97, 0.93, 0.88])
    monkeypatch.setattr(LatencyMeter, "__init__", lambda self, *args: None)
    monkeypatch.setattr(LatencyMeter, "relative_latency", lambda self, network: next(found))
    pruning = PruningConfig(latency=0.9, round_to=4, importance="magnitude", latency_precision="int8")
    path = prune(student, birds, tmp_path, CONFIG, pruning, hardware=HERE)
    assert next(found, None) is None
    header = read_header(path)
    record = header.stages[-1]
    assert isinstance(record, PruneStage)
    assert record.remaining is not None
    assert record.remaining.latency == 0.88
    caplog.set_level("INFO", "edgefg")
    assert prune(student, birds, tmp_path, CONFIG, pruning, hardware=HERE) == path
    assert caplog.messages[-1] == f"{path} exists, made from the same data with the same settings"
    with pytest.raises(TrainingError, match=r"was made with latency 0\.9, now 0\.8"):
        prune(student, birds, tmp_path, CONFIG, PruningConfig(latency=0.8, round_to=4), hardware=HERE)


def test_rounds_need_one_process(student: Path, birds: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--rounds 2 and --devices 2 exclude each other"):
        prune(student, birds, tmp_path, CONFIG, IN_ROUNDS, hardware=Hardware(devices=2))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("--macs 0.7 --params 0.6", "--macs 0.7 and --params 0.6 exclude each other. Give one of them"),
        ("--params 0.7 --latency 0.6", "--params 0.7 and --latency 0.6 exclude each other. Give one of them"),
        ("--macs 0.7 --params 0.7 --latency 0.6", "--macs 0.7 and --params 0.7 and --latency 0.6 exclude each other"),
        ("--latency 1", "--latency 1 is out of range. Give a share between 0 and 1"),
        ("--macs 0", "--macs 0 is out of range. Give a share between 0 and 1"),
        ("--isomorphic --uniform", "--isomorphic and --uniform exclude each other"),
        (
            "--importance l1",
            'Invalid value "l1" for --importance. Choose from: "taylor", "magnitude", "fpgm", "bn-scale".',
        ),
        ("--latency 0.5 --latency-precision fp8", 'Invalid value "fp8" for --latency-precision.'),
        ("--max-ratio 1", "--max-ratio 1.0 is out of range"),
        ("--round-to 0", "--round-to 0 is out of range"),
        ("--rounds 0", "--rounds 0 is out of range"),
        ("--rounds 3 --devices 2", "--rounds 3 and --devices 2 exclude each other"),
    ],
)
def test_bad_combinations_end_2_with_one_line(
    options: str, complaint: str, run: Run, student: Path, birds: Path, tmp_path: Path
) -> None:
    status, out, err = run("prune", student, birds, "--out", tmp_path / "out", *options.split())
    assert (status, out) == (2, "")
    assert complaint in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        "--importance magnitude --isomorphic --params 0.8",
        "--importance fpgm --macs 0.8",
        "--importance bn-scale --uniform --macs 0.9 --rounds 2",
        "--macs 0.8",
    ],
)
def test_the_command_line(options: str, run: Run, student: Path, birds: Path, tmp_path: Path) -> None:
    arguments = [
        *("prune", student, birds, "--out", tmp_path, "--round-to", 4, "--epochs", 1, "--batch-size", 16),
        *("--workers", 0, "--accelerator", "cpu", *options.split()),
    ]
    status, out, err = run(*arguments)
    assert (status, out.splitlines()[-1]) == (0, str(tmp_path / "pruned.safetensors"))
    assert "round 1 of " in err
    network, header = load(tmp_path / "pruned.safetensors")
    assert header.channels
    before, _ = load(student)
    counts = [sum(p.numel() for p in each.parameters()) for each in (network, before)]
    assert counts[0] < counts[1]
    assert network(torch.zeros(1, 32, 32, 3, dtype=torch.uint8)).shape == (1, 2)
    status, out, err = run(*arguments)
    assert (status, "exists, made from the same data" in err) == (0, True)
