"""What a search for the best student looks at, and what it found: plain data, written as ``front.json``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from edgefg.artifact.manifest import Accuracy
from edgefg.errors import DataError

Target = Literal["openvino", "onnx"]
"""What a search can emit and measure on the machine that it runs on."""
Precision = Literal["fp32", "int8"]
Stage = Literal["untrained", "short", "full"]
"""How far a candidate came: measured untrained, distilled for a few epochs, or trained in full."""
_UNITS = {"": 1.0, "ms": 1.0, "s": 1e3, "us": 1e-3, "µs": 1e-3}


class Student(msgspec.Struct, frozen=True, kw_only=True):
    """An architecture to try."""

    backbone: str
    """A timm or torchvision name."""
    weights: str = "hub"
    """See `edgefg.training.weights.load_backbone`."""


class Space(msgspec.Struct, frozen=True, kw_only=True):
    """All combinations that are candidates."""

    students: tuple[Student, ...]
    sizes: tuple[Annotated[int, Meta(ge=16, le=4096)], ...]
    """Network inputs, pixels."""
    macs: tuple[Annotated[float, Meta(gt=0, le=1)], ...] = (1.0, 0.7)
    """Shares of the multiply-accumulates that pruning leaves; 1: not pruned."""
    precisions: tuple[Precision, ...] = ("int8", "fp32")

    def shapes(self) -> list[Shape]:
        """List what is to be trained: every combination but the precision."""
        return [
            Shape(student=student, size=size, macs=macs)
            for student in self.students
            for size in self.sizes
            for macs in self.macs
        ]


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """A network to train: one architecture, at one size, pruned so far."""

    student: Student
    size: int
    macs: float

    @property
    def trunk(self) -> str:
        """Name of the unpruned network, for a folder."""
        return f"{re.sub(r'[^A-Za-z0-9_.]+', '-', self.student.backbone)}-{self.size}"

    @property
    def name(self) -> str:
        """Its own name, for a folder."""
        return self.trunk if self.macs == 1 else f"{self.trunk}-macs{100 * self.macs:.0f}"


class Candidate(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One shape in one precision, and what was measured of it."""

    shape: Shape
    precision: Precision
    stage: Stage
    latency_ms: float
    """Median of `Classifier.predict` on photographs of the data, on this machine."""
    latency_low_ms: float
    """Lower quartile, of the same predictions."""
    latency_high_ms: float
    """Upper quartile."""
    accuracy: Accuracy | None = None
    """On validation data, with its 95 % interval; None where it was not trained."""
    drop: float | None = None
    """Top-1 of the teacher minus its own on the same images, percentage points."""
    artifact: str = ""
    """Its model file, relative to the search's folder."""
    failures: tuple[str, ...] = ()
    """The limits of the gate that it does not keep against its own FP32 network, with the classes concerned."""
    machine: str = ""
    """What its latency was measured on."""

    @property
    def name(self) -> str:
        """Its name, for people."""
        return f"{self.shape.name} {self.precision}"


class Front(msgspec.Struct, frozen=True, kw_only=True):
    """What a search found."""

    target: Target
    device: str
    """The engine's."""
    budget_ms: float
    max_drop: float
    """Greatest loss of top-1 against the teacher, percentage points."""
    teacher: Accuracy
    candidates: tuple[Candidate, ...]
    """All that were measured, quickest first."""
    pareto: tuple[str, ...]
    """Names of the trained ones that no other one of their stage is both quicker and more accurate than."""
    left_out: tuple[str, ...] = ()
    """One line for each that cannot be pruned, trained, quantised or exported: which, and why."""
    machine: str = ""
    """What the latencies were measured on; empty where it was not told."""
    chosen: str | None = None
    """Name of the candidate that was taken; None where none fits."""

    def fits(self, candidate: Candidate) -> bool:
        """Whether a candidate keeps the budget, the tolerated loss and the gate."""
        return self.keeps_figures(candidate) and not candidate.failures

    def keeps_figures(self, candidate: Candidate) -> bool:
        """Whether a candidate keeps the budget and the tolerated loss, whatever the gate says."""
        return candidate.latency_ms <= self.budget_ms and candidate.drop is not None and candidate.drop <= self.max_drop


def space_of(
    *, students: Sequence[Student], sizes: Sequence[int], macs: Sequence[float], precisions: Sequence[str]
) -> Space:
    """Check what is to be combined. Raises `DataError` where a value is out of range or stands twice."""
    lists = {"student": students, "size": sizes, "macs": macs, "precision": precisions}
    for name, values in lists.items():
        if not values or len(set(values)) < len(values):
            raise DataError(f"--{name} has {len(values)} values, some of them twice; needed at least one, each once")
    try:
        space = msgspec.convert(
            {"students": tuple(students), "sizes": sizes, "macs": macs, "precisions": precisions}, Space
        )
    except msgspec.ValidationError as exc:
        raise DataError(
            f"the candidates are out of range ({exc}); needed sizes of 16 to 4096, shares of the MACs above 0 and up to"
            " 1, precisions int8 and fp32"
        ) from exc
    # By their names they have their folders.
    names = [shape.name for shape in space.shapes()]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(
            f"several candidates are called {twice[0]}; needed each --student once, with one choice of weights, and"
            " --macs in whole percent"
        )
    return space


def render(front: Front) -> str:
    """Return the front as a table for people, and the choice, or what came nearest."""
    rows = [f"{'candidate':44} {'stage':9} {'p50 ms':>8} {'top-1 on val':>24} {'drop':>6}"]
    for one in front.candidates:
        accuracy = one.accuracy
        top1 = "" if accuracy is None else f"{accuracy.top1:.1%} ({accuracy.top1_low:.1%} to {accuracy.top1_high:.1%})"
        drop = "" if one.drop is None else f"{one.drop:+.1f}"
        mark = " ← chosen" if one.name == front.chosen else " front" if one.name in front.pareto else ""
        rows.append(f"{one.name:44} {one.stage:9} {one.latency_ms:8.2f} {top1:>24} {drop:>6}{mark}")
    rows += [f"left out: {line}" for line in front.left_out]
    rows += [f"gate: {one.name} ({one.stage}): {failure}" for one in front.candidates for failure in one.failures]
    teacher = f"the teacher has {front.teacher.top1:.1%} of {front.teacher.images} images"
    rows.append(f"{teacher}; asked: at most {front.budget_ms:g} ms and {front.max_drop:g} points less")
    if front.chosen is None:
        rows.append(_why_none(front))
    return "\n".join(rows)


def _why_none(front: Front) -> str:
    """Say which candidate came nearest, and what it lacks."""
    closest = nearest(front)
    if closest is None:
        return "no candidate was measured"
    if closest.drop is None and closest.latency_ms <= front.budget_ms:
        return "what keeps the budget could not be trained or exported: see what was left out"
    if front.fits(closest):
        return (
            f"no candidate that was trained in full fits; {closest.name} does after its short distillation: give more"
            " --finalists, or see what was left out"
        )
    if front.keeps_figures(closest):
        return (
            f"{closest.name} ({closest.stage}) keeps budget and tolerated loss, but not the gate:"
            f" {closest.failures[0]}. Add candidates, allow more (--max-class-drop, --max-flips, --min-agreement), or"
            " train in INT8 (--qat-epochs, with another --out)"
        )
    if closest.drop is None:
        return (
            f"no candidate keeps the budget, so none was trained; nearest: {closest.name} with {closest.latency_ms:.2f}"
            f" ms untrained. Give a smaller --size, --macs or --student, or a larger --budget"
        )
    return (
        f"no candidate fits; nearest: {closest.name} ({closest.stage}) with {closest.latency_ms:.2f} ms and"
        f" {closest.drop:+.1f} points. Train longer (--epochs), allow more (--budget, --max-drop), or add candidates"
    )


def parse_budget(text: str) -> float:
    """Read a latency such as ``3ms``, ``0.5s``, ``800us`` or ``3`` (milliseconds); return milliseconds.

    Raises:
        DataError: it is none, or not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(ms|s|us|µs|)\s*", text)
    if match is None or float(match[1]) == 0:
        raise DataError(f"--budget {text!r} is no latency; needed one such as 3ms, 0.5s or 800us")
    return float(match[1]) * _UNITS[match[2]]


def pareto(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Return the trained candidates that none of the same stage beats in both latency and top-1, quickest first."""
    trained = [candidate for candidate in candidates if candidate.accuracy is not None]
    return [one for one in sorted(trained, key=_rank) if not any(_beats(other, one) for other in trained)]


def best(candidates: Iterable[Candidate]) -> Candidate | None:
    """Return the most accurate candidate, of equals the quickest; None where there is none."""
    trained = [candidate for candidate in candidates if candidate.accuracy is not None]
    return min(trained, key=lambda candidate: (-_top1(candidate), candidate.latency_ms), default=None)


def nearest(front: Front) -> Candidate | None:
    """Return the candidate that misses budget and tolerated loss by least; None where there is none.

    Of trained ones, if there are any: one that fits; else the greater of its two excesses counts, as shares of the
    budget and of ten points. Of untrained ones the quickest.
    """
    trained = [candidate for candidate in front.candidates if candidate.drop is not None]

    def excess(candidate: Candidate) -> tuple[bool, float]:
        assert candidate.drop is not None
        over = max(candidate.latency_ms / front.budget_ms - 1, (candidate.drop - front.max_drop) / 10)
        return not front.fits(candidate), over

    if trained:
        return min(trained, key=excess)
    return min(front.candidates, key=lambda candidate: candidate.latency_ms, default=None)


def worth_training(untrained: Sequence[Candidate], budget_ms: float, most: int) -> list[Shape]:
    """Choose the shapes to distil: those with a precision inside the budget, the slowest first, at most ``most``.

    A larger network, or a larger input, is as a rule the more accurate one; where all of ``most`` fit, none is lost.
    """
    fastest: dict[Shape, float] = {}
    for candidate in untrained:
        fastest[candidate.shape] = min(candidate.latency_ms, fastest.get(candidate.shape, candidate.latency_ms))
    fitting = [shape for shape, latency in fastest.items() if latency <= budget_ms]
    return sorted(fitting, key=lambda shape: -fastest[shape])[:most]


def finalists(short: Sequence[Candidate], budget_ms: float, most: int) -> list[Shape]:
    """Choose the shapes to train in full: the most accurate ones inside the budget after a short distillation."""
    fitting = [candidate for candidate in short if candidate.latency_ms <= budget_ms and candidate.accuracy is not None]
    ranked = sorted(fitting, key=lambda candidate: (-_top1(candidate), candidate.latency_ms))
    return list(dict.fromkeys(candidate.shape for candidate in ranked))[:most]


def read_front(path: Path) -> Front:
    """Read a ``front.json``. Raises `DataError` where it is none."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Front)
    except (OSError, msgspec.DecodeError) as exc:
        raise DataError(f"{path} is no front.json of `edgefg compress` ({exc})") from exc


def _top1(candidate: Candidate) -> float:
    assert candidate.accuracy is not None
    return candidate.accuracy.top1


def _rank(candidate: Candidate) -> tuple[float, float]:
    return candidate.latency_ms, -_top1(candidate)


def _beats(one: Candidate, other: Candidate) -> bool:
    """Whether ``one`` is as good as ``other`` in both figures and better in one; trained alike, else no comparison."""
    at_least = one.latency_ms <= other.latency_ms and _top1(one) >= _top1(other)
    return one.stage == other.stage and at_least and (one.latency_ms, _top1(one)) != (other.latency_ms, _top1(other))
