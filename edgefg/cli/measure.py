"""Verbs that measure and explain models: evaluate, explain, bench."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from cyclopts import Parameter

from edgefg.cli.app import command, needs, print_json
from edgefg.cli.options import Count, DeviceOption, Json, Out, SkipCorrupt, Threads
from edgefg.errors import DataError
from edgefg.log import get_logger

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgefg.data.split import Sample
    from edgefg.evaluation.predictions import Predictions

_log = get_logger(__name__)
_CHECKPOINT = ".safetensors"


class _Request(NamedTuple):
    """Images to classify, and how."""

    data: Path
    split: str | None
    threads: int | None
    device: str | None
    skip_corrupt: bool


class _Found(NamedTuple):
    """Predictions of a model."""

    predictions: Predictions
    unknown: npt.NDArray[np.float32] | None
    """Logits of the images of no known class."""
    train_images: Mapping[str, int] | None


@command
def evaluate(
    model: Path,
    data: Path,
    /,
    *,
    split: str | None = None,
    against: Path | None = None,
    positive: tuple[str, ...] = (),
    unknown: Path | None = None,
    report: Path | None = None,
    threads: Threads = None,
    device: DeviceOption = None,
    skip_corrupt: SkipCorrupt = False,
    json: Json = False,
) -> None:
    """Measure accuracy, calibration and errors per class.

    Also reports risk and coverage of rejection, and the most frequent confusions.

    Args:
        model: An artifact's model file, or a checkpoint (.safetensors).
        data: Labelled images; see `edgefg data`.
        split: train, val or test. Default: test, or val if there is no test split.
        against: Another artifact or checkpoint to compare with on the same images, for instance the FP32 one.
        positive: A class that counts as positive, such as a defect; may be repeated. Adds ROC AUC, sensitivity at 95 %
            specificity, and recall at false-reject rates of 1 % and 5 %.
        unknown: Folder of images of no known class. Adds the share that is rejected when 95 % of the known are kept.
        report: Write an HTML page with plots and images to this file.
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
        _log.warning("left out: %s", skipped)
    if report is not None:
        from edgefg.evaluation.page import write_page

        write_page(report, assessment, predictions, other)
    if json:
        print_json(assessment.as_json())
    else:
        print(render(assessment))


@command
def explain(checkpoint: Path, images: list[Path], /, *, out: Out, top: Count = 3, json: Json = False) -> None:
    """Show which image regions a network looks at.

    Writes a PNG for each image, with attention maps and, for methods that find parts, the parts. Unreadable images are
    reported and skipped; the exit status is then 2. With --json each image is one line.

    Args:
        checkpoint: A teacher, student or pruned student (.safetensors).
        images: Image files, or folders of them.
        top: Number of classes to name, and of maps to show beside their mean.
    """
    if checkpoint.suffix != _CHECKPOINT:
        raise DataError(
            f"{checkpoint} is not a checkpoint, and an artifact returns only logits. Explain the .safetensors file that"
            " it was exported from"
        )
    from edgefg.image_io import image_files

    files = list(dict.fromkeys(file for path in images for file in image_files(path)))
    with needs("train"):
        from edgefg.training.explain import explain_files
    unreadable = 0
    for found in explain_files(checkpoint, files, out, top):
        if found.error is not None:
            unreadable += 1
            _log.error("%s", found.error)
        if json:
            print_json(found)
        elif found.error is None:
            named = "  ".join(f"{candidate.label} {candidate.confidence:.1%}" for candidate in found.top)
            print(f"{found.image}: {named} -> {found.picture}")
    if unreadable:
        sys.exit(2)


@command
def bench(
    artifacts: list[Path],
    /,
    *,
    data: Path | None = None,
    split: str | None = None,
    iterations: Count = 200,
    warmup: Count = 20,
    rounds: Count = 5,
    workers: Count = 1,
    frame: Literal["network", "camera"] = "network",
    threads: Threads = None,
    device: DeviceOption = None,
    skip_corrupt: SkipCorrupt = False,
    report: Annotated[Path | None, Parameter(name="--out")] = None,
) -> None:
    """Measure latency, throughput, memory and cold start.

    Artifacts are measured side by side in one run, in alternating rounds, so that other load on the machine affects all
    of them alike. Prints a table, then one line of JSON.

    Args:
        artifacts: Model files.
        data: Labelled images. Adds accuracy with a 95 % interval.
        split: Split of the data. Default: test, or val if there is no test split.
        iterations: Timed predictions of each artifact.
        warmup: Untimed predictions at the start of each round.
        rounds: Number of rounds.
        workers: Threads that share a classifier when throughput is measured.
        frame: network is a frame of the network's size, camera is one of 1280×720 that is preprocessed.
        report: Also write the JSON to this file.
    """
    from edgefg.benchmarks.harness import bench as run
    from edgefg.benchmarks.report import render

    measured = run(
        artifacts,
        data=data,
        split=split,
        iterations=iterations,
        warmup=warmup,
        rounds=rounds,
        workers=workers,
        threads=threads,
        device=device,
        frame=frame,
        skip_corrupt=skip_corrupt,
    )
    print(render(measured))
    print_json(measured)
    if report is not None:
        import msgspec

        from edgefg.files import atomic_file

        try:
            with atomic_file(report) as temporary:
                temporary.write_bytes(msgspec.json.encode(measured) + b"\n")
        except OSError as exc:
            raise DataError(f"cannot write {report}: {exc.strerror}") from exc


def _need_plots() -> None:
    """Fail before anything is measured."""
    with needs("report"):
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401


def _predictions(model: Path, request: _Request, unknown: Path | None) -> _Found:
    from edgefg.image_io import image_files

    files = [] if unknown is None else image_files(unknown)
    if model.suffix == _CHECKPOINT:
        return _by_checkpoint(model, request, files)
    from edgefg.classifier import Classifier
    from edgefg.data import load_split
    from edgefg.evaluation.predictions import artifact_logits, predict_files, predict_split

    data, split, threads, device, skip_corrupt = request
    with Classifier(model, threads=threads, device=device) as classifier:
        found = predict_split(classifier, data, split, skip_corrupt=skip_corrupt)
        logits = None
        if files:
            [logits], _, skipped = predict_files([artifact_logits(classifier)], files, skip_corrupt=skip_corrupt)
            found = found._replace(skipped=(*found.skipped, *skipped))
        try:
            origin = classifier.manifest.provenance
            _, training = load_split(
                data, "train", classifier.labels, origin.split, trained_on=origin.dataset, skip_corrupt=skip_corrupt
            )
        except DataError:  # the data have no training images, or not the artifact's, which is not an error
            return _Found(found, logits, None)
    return _Found(found, logits, _count(training, found.labels))


def _by_checkpoint(model: Path, request: _Request, unknown: Sequence[Path]) -> _Found:
    with needs("train"):
        from edgefg.data import load_dataset
        from edgefg.training.checkpoint import load
        from edgefg.training.inference import network_logits
    from edgefg.evaluation.predictions import Predictions, predict_files

    network, header = load(model)
    loaded = load_dataset(request.data, expected=header, skip_corrupt=request.skip_corrupt)
    present = [name for name, samples in loaded.splits.items() if samples]
    split = request.split or ("test" if "test" in present else "val")
    if split not in present:
        raise DataError(f"{request.data} has no split {split!r}; choose from {', '.join(present)}")

    model_logits = [network_logits(network, header.input)]
    unseen = predict_files(model_logits, unknown, skip_corrupt=request.skip_corrupt) if unknown else None
    samples = loaded.splits[split]
    predictions = Predictions(
        model=str(model),
        split=split,
        samples=tuple(samples),
        logits=predict_files(model_logits, [sample.path for sample in samples]).logits[0],
        labels=header.labels,
        taxonomy=header.taxonomy,
        skipped=() if unseen is None else unseen.skipped,
    )
    return _Found(
        predictions, None if unseen is None else unseen.logits[0], _count(loaded.splits["train"], header.labels)
    )


def _count(samples: Sequence[Sample], labels: Sequence[str]) -> dict[str, int]:
    """Count the images of each class by name."""
    counts = Counter(sample.label for sample in samples)
    return {name: counts[index] for index, name in enumerate(labels)}
