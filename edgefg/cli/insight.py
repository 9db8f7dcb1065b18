"""The verbs that ask what a model is worth, and why: evaluate, explain."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import numpy as np
import numpy.typing as npt
import typer

from edgefg.classifier import Classifier
from edgefg.cli.app import Count, MaybeCount, command, needs, print_json
from edgefg.cli.device import cpus
from edgefg.data import load_split
from edgefg.data.checks import corrupt_message
from edgefg.data.split import Sample
from edgefg.errors import DataError
from edgefg.image_io import decode_image, image_files

if TYPE_CHECKING:
    from edgefg.evaluation.predictions import Predictions

Out = Annotated[Path, typer.Option()]
Names = Annotated[list[str], typer.Option("--positive")]
_CHECKPOINT = ".safetensors"


class _Request(NamedTuple):
    """What `evaluate` was asked to classify, and how."""

    data: Path
    split: str | None
    threads: int | None
    device: str | None
    skip_corrupt: bool


class _Found(NamedTuple):
    """What a model said."""

    predictions: Predictions
    unknown: npt.NDArray[np.float32] | None
    """Its logits of the images of no known class."""
    train_images: Mapping[str, int] | None


@command
def evaluate(
    model: Path,
    data: Path,
    split: str | None = None,
    against: Path | None = None,
    positive: Names = [],  # noqa: B006 (Typer needs a list; it is never changed)
    unknown: Path | None = None,
    report: Path | None = None,
    threads: MaybeCount = None,
    device: str | None = None,
    skip_corrupt: bool = False,
    json: bool = False,
) -> None:
    """Measure accuracy, calibration, risk–coverage, confusions and each class on labelled images.

    Args:
        model: an artifact's model file, or a checkpoint (.safetensors).
        data: DATA/{train,val,test}/<class>/*.jpg, or DATA/<class>/*.jpg.
        split: train, val or test; where left out test, or val where there is no test.
        against: another artifact or checkpoint (for instance the FP32 one) to compare with on the same images.
        positive: a class that counts as positive (a defect, a tumour); may be repeated. Adds ROC AUC, sensitivity at
            95 % specificity, and recall at false-reject rates of 1 and 5 %.
        unknown: a folder of images of no known class; adds how many are rejected where 95 % of the known are kept.
        report: also write a self-contained HTML page with plots and photographs to this file.
        threads: CPU threads of the engine (artifacts only).
        device: the engine's device (artifacts only).
        skip_corrupt: leave unreadable images out instead of stopping.
        json: print everything as one JSON object.
    """
    from edgefg.evaluation.assessment import assess
    from edgefg.evaluation.text import render

    if report is not None:
        _need_plots()
    request = _Request(data, split, threads, device, skip_corrupt)
    found = _predictions(model, request, unknown)
    other = None if against is None else _predictions(against, request, None).predictions
    predictions = found.predictions
    assessment = assess(
        predictions,
        str(data),
        train_images=found.train_images,
        other=other,
        positive=positive,
        unknown=None if found.unknown is None else (str(unknown), found.unknown),
    )
    for skipped in predictions.skipped:
        print(f"left out: {skipped}", file=sys.stderr)
    if report is not None:
        from edgefg.evaluation.page import write_page

        write_page(report, assessment, predictions, other)
    if json:
        print_json(assessment.as_json())
    else:
        print(render(assessment))


@command
def explain(checkpoint: Path, images: list[Path], out: Out, top: Count = 3, json: bool = False) -> None:
    """Show where a network looks: a PNG for each image, with its attention maps and the parts that it finds.

    An unreadable image is told; the others are explained all the same.

    Args:
        checkpoint: a teacher, student or pruned student (.safetensors).
        images: image files, or folders of them.
        out: folder for the PNGs.
        top: how many classes to name, and how many of several maps to show beside their mean.
        json: print one JSON object a line.
    """
    if checkpoint.suffix != _CHECKPOINT:
        raise DataError(
            f"{checkpoint} is not a checkpoint; an artifact gives logits only: explain the .safetensors that it was"
            " exported from"
        )
    files = list(dict.fromkeys(file for path in images for file in image_files(path)))
    try:
        from edgefg.training.explain import explain_files
    except ImportError as exc:
        raise needs("train", exc) from exc
    unreadable = 0
    for found in explain_files(checkpoint, files, out, top):
        if found.error is not None:
            unreadable += 1
            print(f"edgefg: {found.error}", file=sys.stderr)
        if json:
            print_json(found)
        elif found.error is None:
            named = "  ".join(f"{candidate.label} {candidate.confidence:.1%}" for candidate in found.top)
            print(f"{found.image}: {named} -> {found.picture}")
    if unreadable:
        raise typer.Exit(2)


def _need_plots() -> None:
    """Say what to install before anything is measured."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as exc:
        raise needs("report", exc) from exc


def _predictions(model: Path, request: _Request, unknown: Path | None) -> _Found:
    files = [] if unknown is None else image_files(unknown)
    if model.suffix == _CHECKPOINT:
        return _by_checkpoint(model, request, files)
    from edgefg.evaluation.predictions import classify_files, predict_split

    data, split, threads, device, skip_corrupt = request
    with Classifier(model, threads=threads, device=device) as classifier:
        found = predict_split(classifier, data, split, skip_corrupt=skip_corrupt)
        logits = None
        if files:
            logits, _, problems = classify_files(classifier, files, skip_corrupt)
            found = found._replace(skipped=(*found.skipped, *problems))
        try:
            origin = classifier.manifest.provenance
            _, training = load_split(
                data, "train", classifier.labels, origin.split, trained_on=origin.dataset, skip_corrupt=skip_corrupt
            )
        except DataError:  # the data have no training images, or not the artifact's, which is no one's fault
            return _Found(found, logits, None)
    return _Found(found, logits, _count(training, found.labels))


def _by_checkpoint(model: Path, request: _Request, unknown: Sequence[Path]) -> _Found:
    try:
        from edgefg.data import load_dataset
        from edgefg.training.checkpoint import load
        from edgefg.training.loop.fit import predict
    except ImportError as exc:
        raise needs("train", exc) from exc
    from edgefg.evaluation.predictions import Predictions

    network, header = load(model)
    loaded = load_dataset(request.data, expected=header, skip_corrupt=request.skip_corrupt)
    present = [name for name, samples in loaded.splits.items() if samples]
    split = request.split or ("test" if "test" in present else "val")
    if split not in present:
        raise DataError(f"{request.data} has no split {split!r}; needed one of {', '.join(present)}")

    def logits_of(samples: Sequence[Sample]) -> npt.NDArray[np.float32]:
        found: npt.NDArray[np.float32] = predict(
            network, samples, header.input, batch_size=32, workers=min(2, cpus() - 1)
        )[0]
        return found

    samples = loaded.splits[split]
    logits = logits_of([Sample(file, 0) for file in _readable(unknown, request.skip_corrupt)]) if unknown else None
    predictions = Predictions(
        model=str(model),
        split=split,
        samples=tuple(samples),
        logits=logits_of(samples),
        labels=header.labels,
        taxonomy=header.taxonomy,
    )
    return _Found(predictions, logits, _count(loaded.splits["train"], header.labels))


def _readable(files: Sequence[Path], skip_corrupt: bool) -> list[Path]:
    """Decode images at an eighth, as a data set's are, and leave out those that cannot be read."""
    good, problems = [], []
    for file in files:
        try:
            decode_image(file.read_bytes(), str(file), reduced=True)
        except DataError as exc:
            problems.append(str(exc))
        except OSError as exc:
            problems.append(f"{file}: {exc.strerror}")
        else:
            good.append(file)
    if problems and not (skip_corrupt and good):
        raise DataError(corrupt_message(problems, len(files)))
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    return good


def _count(samples: Sequence[Sample], labels: Sequence[str]) -> dict[str, int]:
    """Count the images of each class by name."""
    counts = Counter(sample.label for sample in samples)
    return {name: counts[index] for index, name in enumerate(labels)}
