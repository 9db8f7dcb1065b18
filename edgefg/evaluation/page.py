"""An assessment as one HTML file that needs nothing else: figures, plots, tables, photographs of what was confused."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import numpy as np

from edgefg import __version__, metrics
from edgefg.errors import DataError
from edgefg.evaluation import plots
from edgefg.evaluation.assessment import Assessment, Comparison, PositiveView, UnknownView
from edgefg.evaluation.predictions import Predictions
from edgefg.evaluation.text import percent
from edgefg.files import atomic_file
from edgefg.image_io import read_image
from edgefg.preprocess import resize

_PAIRS = 12  # confused pairs with photographs
_MISTAKES = 3  # photographs of each, at most
_PHOTO_SIDE = 240  # pixels
_MATRIX_CLASSES = 100  # what a matrix shows legibly; of more classes, those with most errors
_LISTED = 30  # rows of a list that could be long

_STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1c2127; --soft: #5d6772; --line: #dde2e8; --card: #f5f7f9;
  --accent: #2b7fdb; --bad: #d9480f; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171b; --ink: #e4e8ec; --soft: #97a2ae; --line: #2e353d;
  --card: #1c2126; --accent: #5aa5f2; --bad: #ff8a5c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 2rem 1.25rem 4rem; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
p { margin: .4rem 0; } .soft { color: var(--soft); overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: .6rem; margin: 1.25rem 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .6rem .8rem; }
.card b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: .82rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 1.5rem; }
figure { margin: 0; } figcaption { color: var(--soft); font-size: .85rem; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: system-ui, sans-serif !important; } svg image { image-rendering: pixelated; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .22rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: normal; overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: 600; font-size: .82rem; }
.bar { display: block; min-width: 5.5rem; padding: 0 .35rem; border-radius: 3px;
  background: linear-gradient(to right, color-mix(in srgb, var(--accent) 35%, transparent) var(--share),
  transparent var(--share)); }
.pair { margin: 1.4rem 0; } .pair h3 { font-size: 1rem; margin: 0 0 .4rem; overflow-wrap: anywhere; }
.photos { display: flex; flex-wrap: wrap; gap: .8rem; } .photos figure { width: 190px; }
.photos img { width: 190px; height: 190px; object-fit: contain; background: var(--card); border-radius: 6px;
  border: 2px solid var(--bad); } .photos .example img { border-color: var(--accent); }
.photos figcaption { overflow-wrap: anywhere; line-height: 1.35; }
"""


def write_page(path: Path, found: Assessment, predictions: Predictions, other: Predictions | None = None) -> None:
    """Write the page, whole or not at all. It needs matplotlib (the extra ``report``).

    Args:
        path: the HTML file.
        found: what `edgefg.evaluation.assessment.assess` made of ``predictions``.
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
    title = f"{Path(found.model).name} on {found.split}"
    sections = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(found.model)}<br>{escape(found.data)}, split {escape(found.split)},'
        f" {found.scores.images} images, {len(found.classes)} classes; edgefg {__version__}</p>",
        _cards(found),
        _skipped(found.skipped),
        _taxonomy(found),
        _comparison(found.against),
        _positive(found.positive),
        _unknown(found.unknown),
        _curves(predictions, other),
        _matrix(found, predictions),
        _gallery(found, predictions),
        _class_table(found),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n" + "\n".join(filter(None, sections)) + "\n</html>\n"
    )


def _cards(found: Assessment) -> str:
    scores = found.scores
    cards = [
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
    inner = "".join(f'<div class="card"><b>{value}</b><span>{name}</span></div>' for value, name in cards)
    return f'<div class="cards">{inner}</div>'


def _skipped(lines: Sequence[str]) -> str:
    if not lines:
        return ""
    return f'<p class="soft">{len(lines)} unreadable images were left out (first: {escape(lines[0])}).</p>'


def _taxonomy(found: Assessment) -> str:
    rows = [(escape(level.level), str(level.groups), str(level.accuracy)) for level in found.taxonomy]
    return _section("Coarser levels", _table(("level", "groups", "accuracy [95 %]"), rows)) if rows else ""


def _comparison(against: Comparison | None) -> str:
    if against is None:
        return ""
    text = (
        f"<p>Against {escape(against.model)}: its top-1 is {against.top1},"
        f" this model's drop {100 * against.drop:+.2f} points."
        f" {against.gained} images gained, {against.lost} lost, {against.changed} named differently;"
        f" McNemar's p = {against.p:.3g}.</p>"
    )
    rows = [
        (escape(c.name), str(c.images), percent(c.recall), percent(c.other), f"{100 * c.drop:+.1f}")
        for c in against.classes
        if c.drop > 0
    ]
    heads = ("classes that lost", "images", "recall", "the other's", "drop, points")
    return _section("Comparison", text + (_table(heads, rows[:_LISTED]) + _cut(len(rows)) if rows else ""))


def _positive(view: PositiveView | None) -> str:
    if view is None:
        return ""
    rows = [
        (name, str(point.recall), "none" if point.threshold is None else f"{point.threshold:.6g}")
        for name, point in (
            ("sensitivity at specificity 95 %", view.sensitivity_at_95_specificity),
            ("recall at a false-reject rate of 1 %", view.recall_at_1_false_reject),
            ("recall at a false-reject rate of 5 %", view.recall_at_5_false_reject),
        )
    ]
    text = (
        f"<p>{escape(', '.join(view.classes))}: {view.positives} images against {view.negatives}, by summed"
        f" probability. ROC AUC {view.roc_auc:.4f}. Thresholds were chosen on these very images.</p>"
    )
    return _section("Positive classes", text + _table(("operating point", "found [95 %]", "threshold"), rows))


def _unknown(view: UnknownView | None) -> str:
    if view is None:
        return ""
    return _section(
        "Unknown images",
        f"<p>{view.images} images of no known class in {escape(view.folder)}: {view.rejected} rejected at the"
        f" confidence {view.threshold:.4f}, which keeps {view.kept:.1%} of the known. ROC AUC {view.roc_auc:.4f}.</p>",
    )


def _curves(predictions: Predictions, other: Predictions | None) -> str:
    def curve(of: Predictions) -> tuple[metrics.FloatArray, metrics.FloatArray]:
        return metrics.risk_coverage(of.probabilities.max(axis=1), of.predicted == of.targets)

    confidence, correct = predictions.probabilities.max(axis=1), predictions.predicted == predictions.targets
    drawn = [
        (
            plots.reliability(metrics.calibration_bins(confidence, correct)),
            "Reliability: bars below the dashed line are overconfident. Below: how many images have that confidence.",
        ),
        (
            plots.risk_coverage(curve(predictions), curve(other) if other is not None else None),
            "Risk–coverage: errors among the images that are accepted, surest first. Dotted: 5 % risk.",
        ),
    ]
    inner = "".join(f"<figure>{svg}<figcaption>{caption}</figcaption></figure>" for svg, caption in drawn)
    return _section("Confidence", f'<div class="plots">{inner}</div>')


def _matrix(found: Assessment, predictions: Predictions) -> str:
    names, classes = predictions.labels, len(predictions.labels)
    counts = metrics.confusion_matrix(predictions.predicted, predictions.targets, classes)
    occurs = counts.sum(axis=0) + counts.sum(axis=1)
    errors = occurs - 2 * counts.diagonal()
    worst = np.argsort(-errors, kind="stable")
    present = int((occurs > 0).sum())
    chosen = sorted(worst[occurs[worst] > 0][:_MATRIX_CLASSES].tolist())
    # Classes of a group stand together.
    coarse = [level.groups for level in reversed(predictions.taxonomy)]
    chosen.sort(key=lambda i: [groups[i] for groups in coarse])
    svg = plots.confusion(counts[np.ix_(chosen, chosen)], [names[i] for i in chosen])
    cut = f" Of {present} classes, the {len(chosen)} with most errors." if len(chosen) < present else ""
    width = min(1080, 300 + 40 * len(chosen))
    return _section(
        "Confusion matrix",
        f'<figure style="max-width:{width}px">{svg}<figcaption>Rows are labels, columns predictions. Blue: right;'
        f" orange: confused; the stronger, the greater the share of the row.{cut}</figcaption></figure>",
    )


def _gallery(found: Assessment, predictions: Predictions) -> str:
    if not found.confused:
        return ""
    blocks = [_pair(predictions, pair.label, pair.predicted, pair.images, pair.of) for pair in found.confused[:_PAIRS]]
    shown = f'<p class="soft">The {len(blocks)} most frequent of {len(found.confused)} confused pairs.</p>'
    return _section("Most confused", shown + "".join(blocks))


def _pair(predictions: Predictions, label: str, taken_for: str, images: int, of: int) -> str:
    """Show mistakes, the surest first, beside an example of the class that they were taken for."""
    a, b = predictions.labels.index(label), predictions.labels.index(taken_for)
    shares, targets, predicted = predictions.probabilities, predictions.targets, predictions.predicted
    wrong = np.flatnonzero((targets == a) & (predicted == b))
    wrong = wrong[np.argsort(-shares[wrong, b], kind="stable")]
    figures = [
        _photo(
            predictions.samples[i].path,
            f"{taken_for} {shares[i, b]:.1%}, {label} {shares[i, a]:.1%}",
            "",
        )
        for i in wrong[:_MISTAKES].tolist()
    ]
    members = np.flatnonzero(targets == b)
    if len(members):
        i = int(members[shares[members, b].argmax()])
        figures.append(_photo(predictions.samples[i].path, f"so looks {taken_for} ({shares[i, b]:.1%})", "example"))
    heading = f"{escape(label)} taken for {escape(taken_for)}: {images} of {of} images"
    return f'<div class="pair"><h3>{heading}</h3><div class="photos">{"".join(figures)}</div></div>'


def _photo(path: Path, caption: str, kind: str) -> str:
    import cv2

    image = read_image(path)
    scale = min(1.0, _PHOTO_SIDE / max(image.shape[:2]))
    image = resize(image, *(max(1, round(scale * side)) for side in image.shape[:2]))
    encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 82])[1]
    data = base64.b64encode(encoded.tobytes()).decode()
    return (
        f'<figure class="{kind}"><img src="data:image/jpeg;base64,{data}" alt="{escape(caption)}" loading="lazy">'
        f'<figcaption>{escape(caption)}<br><span title="{escape(str(path))}">{escape(path.name)}</span></figcaption>'
        "</figure>"
    )


def _class_table(found: Assessment) -> str:
    rare = set(found.rarest)
    known = any(entry.train_images is not None for entry in found.classes)
    rows = []
    for entry in sorted(found.classes, key=lambda e: (e.recall is None, e.recall or 0.0, e.name)):
        name = escape(entry.name) + (' <span class="soft">(rare)</span>' if entry.name in rare else "")
        train = (str(entry.train_images),) if known else ()
        rows.append((name, *train, str(entry.images), *map(_bar, (entry.recall, entry.precision, entry.f1))))
    heads = ("class, worst recall first", *(("to train on",) if known else ()), "images", "recall", "precision", "F1")
    return _section("Classes", _table(heads, rows))


def _bar(value: float | None) -> str:
    """Return a share of 0…1 as a cell's content, a bar behind it."""
    return "-" if value is None else f'<span class="bar" style="--share:{value:.1%}">{value:.1%}</span>'


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay out rows whose cells are HTML already."""
    head = "".join(f"<th>{cell}</th>" for cell in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>\n" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>\n{body}</table></div>'


def _section(heading: str, inner: str) -> str:
    return f"<section><h2>{heading}</h2>\n{inner}</section>"


def _cut(total: int) -> str:
    """Say where a list was cut off."""
    return f'<p class="soft">{_LISTED} of {total} are shown.</p>' if total > _LISTED else ""
