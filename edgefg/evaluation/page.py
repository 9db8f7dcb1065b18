"""An assessment as one self-contained HTML file: figures, plots, tables, photographs of confused classes."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import NamedTuple

import numpy as np

from edgefg import __version__, metrics
from edgefg.errors import DataError
from edgefg.evaluation import plots
from edgefg.evaluation.assessment import Assessment, ConfusedPair
from edgefg.evaluation.predictions import Predictions
from edgefg.evaluation.text import percent
from edgefg.files import atomic_file
from edgefg.image_io import read_image
from edgefg.preprocess import resize

_TEMPLATE = "page.html.j2"
_PAIRS = 12  # confused pairs with photographs
_MISTAKES = 3  # photographs of each, at most
_PHOTO_SIDE = 240  # pixels
_MATRIX_CLASSES = 100  # what a matrix shows legibly; of more classes, those with most errors
_LISTED = 30  # rows of a list that could be long


class _Photo(NamedTuple):
    path: Path
    caption: str
    jpeg: str
    """Base64."""
    example: bool = False
    """Whether this is an example of the predicted class instead of a mistake."""


class _Matrix(NamedTuple):
    svg: str
    width: int
    """Pixels."""
    drawn: int
    """Number of classes in it."""
    present: int
    """Number of classes that occur."""


def write_page(path: Path, found: Assessment, predictions: Predictions, other: Predictions | None = None) -> None:
    """Write the page atomically. It needs matplotlib and Jinja2 (the extra ``report``).

    Args:
        path: the HTML file.
        found: the assessment of ``predictions``, by `edgefg.evaluation.assessment.assess`.
        predictions: the model's; the photographs are read again for the gallery.
        other: those of the model that it was compared with.

    Raises:
        DataError: a photograph cannot be read, or the file cannot be written.
    """
    text = page(found, predictions, other)
    try:
        with atomic_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="replace")
    except OSError as exc:
        raise DataError(f"cannot write {path}: {exc.strerror}") from exc


def page(found: Assessment, predictions: Predictions, other: Predictions | None = None) -> str:
    """Return the page's HTML; see `write_page`."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    confidence, correct = predictions.probabilities.max(axis=1), predictions.predicted == predictions.targets
    return environment.get_template(_TEMPLATE).render(
        title=f"{Path(found.model).name} on {found.split}",
        version=__version__,
        found=found,
        cards=_cards(found),
        listed=_LISTED,
        reliability=plots.reliability(metrics.calibration_bins(confidence, correct)),
        risk=plots.risk_coverage(_risk(predictions), None if other is None else _risk(other)),
        matrix=_matrix(predictions),
        pairs=[(pair, _photos(predictions, pair)) for pair in found.confused[:_PAIRS]],
        classes=sorted(found.classes, key=lambda entry: (entry.recall is None, entry.recall or 0.0, entry.name)),
        trained=any(entry.train_images is not None for entry in found.classes),
    )


def _cards(found: Assessment) -> list[tuple[str, str]]:
    """Return the figures at the top of the page, each with its name."""
    scores = found.scores
    return [
        (f"{scores.top1:.1%}", f"top-1 [{scores.top1_low:.1%}, {scores.top1_high:.1%}]"),
        (f"{scores.top5:.1%}", "top-5"),
        (f"{scores.balanced:.1%}", "mean per class"),
        (f"{scores.macro_f1:.3f}", "macro F1"),
        (f"{found.rare_recall:.1%}", f"mean recall of the {len(found.rarest)} rarest classes"),
        (f"{scores.coverage_at_5_risk:.1%}", "coverage at 5 % risk"),
        (f"{scores.aurc:.4f}", "AURC (lower is better)"),
        (f"{scores.ece:.3f}", "calibration error (ECE, 15 bins)"),
        (f"{scores.nll:.3f}", "negative log-likelihood"),
    ]


def _risk(of: Predictions) -> tuple[metrics.FloatArray, metrics.FloatArray]:
    return metrics.risk_coverage(of.probabilities.max(axis=1), of.predicted == of.targets)


def _matrix(predictions: Predictions) -> _Matrix:
    names, classes = predictions.labels, len(predictions.labels)
    counts = metrics.confusion_matrix(predictions.predicted, predictions.targets, classes)
    occurs = counts.sum(axis=0) + counts.sum(axis=1)
    errors = occurs - 2 * counts.diagonal()
    worst = np.argsort(-errors, kind="stable")
    chosen = sorted(worst[occurs[worst] > 0][:_MATRIX_CLASSES].tolist())
    # Classes of a group stand together.
    coarse = [level.groups for level in reversed(predictions.taxonomy)]
    chosen.sort(key=lambda i: [groups[i] for groups in coarse])
    svg = plots.confusion(counts[np.ix_(chosen, chosen)], [names[i] for i in chosen])
    return _Matrix(svg, min(1080, 300 + 40 * len(chosen)), len(chosen), int((occurs > 0).sum()))


def _photos(predictions: Predictions, pair: ConfusedPair) -> list[_Photo]:
    """Return mistakes, the surest first, and an example of the class that they were taken for."""
    a, b = predictions.labels.index(pair.label), predictions.labels.index(pair.predicted)
    shares, targets, predicted = predictions.probabilities, predictions.targets, predictions.predicted
    wrong = np.flatnonzero((targets == a) & (predicted == b))
    wrong = wrong[np.argsort(-shares[wrong, b], kind="stable")]
    photos = [
        _photo(predictions.samples[i].path, f"{pair.predicted} {shares[i, b]:.1%}, {pair.label} {shares[i, a]:.1%}")
        for i in wrong[:_MISTAKES].tolist()
    ]
    members = np.flatnonzero(targets == b)
    if len(members):
        i = int(members[shares[members, b].argmax()])
        example = _photo(predictions.samples[i].path, f"so looks {pair.predicted} ({shares[i, b]:.1%})")
        photos.append(example._replace(example=True))
    return photos


def _photo(path: Path, caption: str) -> _Photo:
    import cv2

    image = read_image(path)
    scale = min(1.0, _PHOTO_SIDE / max(image.shape[:2]))
    image = resize(image, *(max(1, round(scale * side)) for side in image.shape[:2]))
    encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 82])[1]
    return _Photo(path, caption, base64.b64encode(encoded.tobytes()).decode())
