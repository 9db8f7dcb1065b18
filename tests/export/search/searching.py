"""A small search, and candidates, for the tests of a search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msgspec.structs import replace

from edgefg.artifact.manifest import Accuracy
from edgefg.data import ImageDataset
from edgefg.export.search.candidates import Architecture, Candidate, ParetoFront, Student
from edgefg.export.search.context import SearchContext
from edgefg.preprocess import InputSpec
from edgefg.settings.gate import Gate
from edgefg.settings.hardware import Hardware
from edgefg.settings.pruning import PruningConfig
from edgefg.settings.quantization import QuantizationConfig
from edgefg.settings.search import CandidateConfig, SearchConfig, TrialSchedule
from edgefg.settings.training import Schedule, TrainingConfig

HERE = Hardware(accelerator="cpu", workers=0)
CONFIG = TrainingConfig(image_size=32, schedule=Schedule(epochs=2, batch_size=16))
SEARCH = SearchConfig(
    max_drop=100.0,
    students=("test_resnet=none",),
    sizes=(32,),
    macs=(1.0, 0.8),
    trials=2,
    finalists=1,
    schedule=TrialSchedule(short_epochs=1, prune_epochs=1, train_share=0.8),
)
CANDIDATES = CandidateConfig(
    training=CONFIG,
    pruning=PruningConfig(round_to=4),  # the channels of the tests' networks are few
    quantization=QuantizationConfig(num_samples=8),
)
STUDENT = Student(backbone="net")
RESNET = Architecture(student=Student(backbone="test_resnet", weights="none"), size=32, macs=1.0)
PRUNED = replace(RESNET, macs=0.8)


def accuracy(top1: float) -> Accuracy:
    return Accuracy(
        data="val", images=100, top1=top1, top1_low=max(0, top1 - 0.05), top1_high=min(1, top1 + 0.05), balanced=top1
    )


def candidate(size: int, latency: float, top1: float | None = None, **changed: Any) -> Candidate:
    found = Candidate(
        architecture=Architecture(student=STUDENT, size=size, macs=1.0),
        precision="int8",
        stage="untrained" if top1 is None else "full",
        latency_ms=latency,
        latency_low_ms=latency * 0.9,
        latency_high_ms=latency * 1.1,
        accuracy=None if top1 is None else accuracy(top1),
        drop=None if top1 is None else 100 * (0.9 - top1),
    )
    return replace(found, **changed)


def front(*candidates: Candidate, budget: float = 3.0, max_drop: float = 1.0) -> ParetoFront:
    return ParetoFront(
        target="openvino", device="CPU", budget_ms=budget, max_drop=max_drop, teacher=accuracy(0.9),
        candidates=candidates, pareto=(),
    )  # fmt: skip


def context_of(out: Path, data: ImageDataset, **changed: Any) -> SearchContext:
    """Return the context of a search in an existing folder, whose teacher is not read."""
    context = SearchContext(
        teacher=out / "teacher.safetensors", teacher_accuracy=accuracy(0.9), data=data,
        input=InputSpec(height=32, width=32), out=out, to="openvino", device=None, machine="here", search=SEARCH,
        candidates=CANDIDATES, gate=Gate(max_drop=100), hardware=HERE,
    )  # fmt: skip
    return replace(context, **changed)
