"""The search space and the results of a search: plain data, written as ``front.json``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from edgefg.artifact.manifest import Accuracy
from edgefg.errors import DataError
from edgefg.settings.quantization import Precision, TargetName
from edgefg.settings.search import SearchConfig

Stage = Literal["untrained", "short", "full"]
"""How far a candidate was trained: not at all, by a short distillation, or in full."""
_UNITS = {"": 1.0, "ms": 1.0, "s": 1e3, "us": 1e-3, "µs": 1e-3}


class Student(msgspec.Struct, frozen=True, kw_only=True):
    """A backbone and its pretrained weights."""

    backbone: str
    """A timm or torchvision name."""
    weights: str = "hub"
    """See `edgefg.training.weights.load_backbone`."""

    @classmethod
    def parse(cls, text: str) -> Student:
        """Read ``NAME`` or ``NAME=WEIGHTS``. Raises `DataError` if there is no name."""
        name, _, weights = text.partition("=")
        if not name:
            raise DataError(f"--student {text!r} does not name a backbone. Give NAME or NAME=WEIGHTS")
        return cls(backbone=name, weights=weights or "hub")


class Architecture(msgspec.Struct, frozen=True, kw_only=True):
    """A network to train: a student at one image size, pruned to a share of its multiply-accumulates."""

    student: Student
    size: int
    """Height and width of the input in pixels."""
    macs: float
    """Share of the multiply-accumulates that pruning keeps. 1: not pruned."""

    @property
    def unpruned_name(self) -> str:
        """Folder name of the network before it is pruned."""
        return f"{re.sub(r'[^A-Za-z0-9_.]+', '-', self.student.backbone)}-{self.size}"

    @property
    def name(self) -> str:
        """Folder name of the network."""
        return self.unpruned_name if self.macs == 1 else f"{self.unpruned_name}-macs{100 * self.macs:.0f}"


Variant = tuple[Architecture, Precision]
"""A point of the search space."""


class Candidate(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Measurements of an architecture in one precision."""

    architecture: Architecture
    precision: Precision
    stage: Stage
    latency_ms: float
    """Median latency of `Classifier.predict` on photographs of the data."""
    latency_low_ms: float
    """Lower quartile of the latency."""
    latency_high_ms: float
    """Upper quartile of the latency."""
    accuracy: Accuracy | None = None
    """Accuracy on validation images, with its 95 % interval. None: not trained."""
    drop: float | None = None
    """Loss of top-1 against the teacher on the same images, in percentage points. None: not trained."""
    artifact: str = ""
    """Path of the model file, relative to the search's folder."""
    failures: tuple[str, ...] = ()
    """Limits of the gate that do not hold against the FP32 network, with the classes concerned."""
    machine: str = ""
    """The machine that measured the latency."""

    @property
    def variant(self) -> Variant:
        """Its place in the search space."""
        return self.architecture, self.precision

    @property
    def name(self) -> str:
        """Its name for people."""
        return f"{self.architecture.name} {self.precision}"


class ParetoFront(msgspec.Struct, frozen=True, kw_only=True):
    """Result of a search."""

    target: TargetName
    device: str
    """Device of the inference engine."""
    budget_ms: float
    max_drop: float
    """Largest loss of top-1 against the teacher, in percentage points."""
    teacher: Accuracy
    candidates: tuple[Candidate, ...]
    """All candidates that were measured, the fastest first."""
    pareto: tuple[str, ...]
    """Names of the trained candidates that no other one of their stage beats in both latency and top-1."""
    skipped: tuple[str, ...] = ()
    """One line for each candidate that could not be pruned, trained, quantised or exported."""
    machine: str = ""
    """The machine that measured the latencies."""
    chosen: str | None = None
    """Name of the chosen candidate. None: no candidate is feasible."""

    def is_feasible(self, candidate: Candidate) -> bool:
        """Whether a candidate is within the budget and the largest loss, and passes the gate."""
        return self.keeps_limits(candidate) and not candidate.failures

    def keeps_limits(self, candidate: Candidate) -> bool:
        """Whether a candidate is within the budget and the largest loss, regardless of the gate."""
        return candidate.latency_ms <= self.budget_ms and candidate.drop is not None and candidate.drop <= self.max_drop


def search_space(search: SearchConfig, teacher_size: int) -> list[Architecture]:
    """List the architectures of a search: each student at each size with each share of MACs.

    Raises:
        DataError: a value occurs twice, or two architectures have the same name.
    """
    students = [Student.parse(text) for text in search.students]
    # Default: the teacher's size and three smaller ones, multiples of 16.
    shares = (1, 6 / 7, 5 / 7, 4 / 7)
    sizes = search.sizes or tuple(dict.fromkeys(max(32, round(teacher_size * share / 16) * 16) for share in shares))
    lists = {"student": students, "size": sizes, "macs": search.macs, "precision": search.precisions}
    for name, values in lists.items():
        if not values:
            raise DataError(f"there is no --{name}. Give at least one")
        if len(set(values)) < len(values):
            raise DataError(f"a --{name} was given twice. Give each one once")
    architectures = [
        Architecture(student=student, size=size, macs=macs)
        for student in students
        for size in sizes
        for macs in search.macs
    ]
    names = [one.name for one in architectures]
    if twice := [name for name in names if names.count(name) > 1]:  # they would share a folder
        raise DataError(
            f"several architectures are called {twice[0]}. Give each --student once, with one choice of weights, and"
            " --macs in whole percent"
        )
    return architectures


def render(front: ParetoFront) -> str:
    """Return the candidates as a table for people, and why none was chosen if so."""
    rows = [f"{'candidate':44} {'stage':9} {'p50 ms':>8} {'top-1 on val':>24} {'drop':>6}"]
    for one in front.candidates:
        accuracy = one.accuracy
        top1 = "" if accuracy is None else f"{accuracy.top1:.1%} ({accuracy.top1_low:.1%} to {accuracy.top1_high:.1%})"
        drop = "" if one.drop is None else f"{one.drop:+.1f}"
        mark = " ← chosen" if one.name == front.chosen else " front" if one.name in front.pareto else ""
        rows.append(f"{one.name:44} {one.stage:9} {one.latency_ms:8.2f} {top1:>24} {drop:>6}{mark}")
    rows += [f"skipped: {line}" for line in front.skipped]
    rows += [f"gate: {one.name} ({one.stage}): {failure}" for one in front.candidates for failure in one.failures]
    rows.append(
        f"teacher: {front.teacher.top1:.1%} of {front.teacher.images} images; limits: {front.budget_ms:g} ms and a loss"
        f" of {front.max_drop:g} points"
    )
    if front.chosen is None:
        rows.append(_why_none(front))
    return "\n".join(rows)


def _why_none(front: ParetoFront) -> str:
    """Name the closest candidate and the limit that it exceeds."""
    one = closest(front)
    if one is None:
        return "no candidate was measured"
    if one.drop is None and one.latency_ms <= front.budget_ms:
        return "no candidate within the budget could be trained and exported. See which were skipped, and why"
    if front.is_feasible(one):
        return (
            f"no candidate that was trained in full is feasible, but {one.name} is after its short distillation. Raise"
            " --finalists, or see why it was skipped"
        )
    if front.keeps_limits(one):
        return (
            f"{one.name} ({one.stage}) keeps the budget and --max-drop, but not the gate: {one.failures[0]}. Add"
            " candidates, relax the gate (--max-class-drop, --max-flips, --min-agreement), or use --qat-epochs with"
            " another --out"
        )
    if one.drop is None:
        return (
            f"no candidate keeps the budget, so none was trained. The fastest is {one.name} with {one.latency_ms:.2f}"
            " ms. Try a smaller --size, --macs or --student, or raise --budget"
        )
    return (
        f"no candidate is feasible. The closest is {one.name} ({one.stage}) with {one.latency_ms:.2f} ms and"
        f" {one.drop:+.1f} points. Raise --epochs, --budget or --max-drop, or add candidates"
    )


def parse_budget(text: str) -> float:
    """Read a latency such as ``3ms``, ``0.5s``, ``800us`` or ``3`` (milliseconds). Returns milliseconds.

    Raises:
        DataError: it is not a latency, or not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(ms|s|us|µs|)\s*", text)
    if match is None or float(match[1]) == 0:
        raise DataError(f"--budget {text!r} is not a latency. Give one such as 3ms, 0.5s or 800us")
    return float(match[1]) * _UNITS[match[2]]


def pareto(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Return the trained candidates that no other one of their stage beats in latency and top-1, the fastest first."""
    trained = [candidate for candidate in candidates if candidate.accuracy is not None]
    return [one for one in sorted(trained, key=_rank) if not any(_dominates(other, one) for other in trained)]


def most_accurate(candidates: Iterable[Candidate]) -> Candidate | None:
    """Return the trained candidate of the highest top-1, the faster one of equals. None: none was trained."""
    trained = [candidate for candidate in candidates if candidate.accuracy is not None]
    return min(trained, key=lambda candidate: (-_top1(candidate), candidate.latency_ms), default=None)


def closest(front: ParetoFront) -> Candidate | None:
    """Return the candidate that is closest to being feasible. None: no candidate was measured.

    Of trained candidates, it is a feasible one, or else the one that exceeds its limits least (the larger of the two
    excesses counts). The excess of the latency is relative to the budget, that of the loss relative to ten points. If
    none was trained, it is the fastest.
    """

    def excess(candidate: Candidate) -> tuple[bool, float]:
        assert candidate.drop is not None
        over = max(candidate.latency_ms / front.budget_ms - 1, (candidate.drop - front.max_drop) / 10)
        return not front.is_feasible(candidate), over

    if trained := [candidate for candidate in front.candidates if candidate.drop is not None]:
        return min(trained, key=excess)
    return min(front.candidates, key=lambda candidate: candidate.latency_ms, default=None)


def shortlist(untrained: Sequence[Candidate], budget_ms: float, count: int) -> list[Architecture]:
    """Select the architectures to distil: those with a precision within the budget, the slowest first.

    A larger network, or a larger input, is usually more accurate.
    """
    fastest: dict[Architecture, float] = {}
    for candidate in untrained:
        known = fastest.get(candidate.architecture, candidate.latency_ms)
        fastest[candidate.architecture] = min(candidate.latency_ms, known)
    fitting = [architecture for architecture, latency in fastest.items() if latency <= budget_ms]
    return sorted(fitting, key=lambda architecture: -fastest[architecture])[:count]


def select_finalists(short: Sequence[Candidate], budget_ms: float, count: int) -> list[Architecture]:
    """Select the architectures to train in full: the most accurate within the budget after a short distillation."""
    fitting = [candidate for candidate in short if candidate.latency_ms <= budget_ms and candidate.accuracy is not None]
    ranked = sorted(fitting, key=lambda candidate: (-_top1(candidate), candidate.latency_ms))
    return list(dict.fromkeys(candidate.architecture for candidate in ranked))[:count]


def _top1(candidate: Candidate) -> float:
    assert candidate.accuracy is not None
    return candidate.accuracy.top1


def _rank(candidate: Candidate) -> tuple[float, float]:
    return candidate.latency_ms, -_top1(candidate)


def _dominates(one: Candidate, other: Candidate) -> bool:
    """Whether ``one`` is at least as fast and as accurate as ``other``, and better in at least one of them.

    Candidates of different stages do not dominate each other.
    """
    at_least = one.latency_ms <= other.latency_ms and _top1(one) >= _top1(other)
    return one.stage == other.stage and at_least and (one.latency_ms, _top1(one)) != (other.latency_ms, _top1(other))
