"""An assessment as plain text: the figures, then one table per view."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgefg.evaluation.assessment import Against, Assessment, PositiveView, Proportion, UnknownView
from edgefg.evaluation.tables import table

PAIRS = 10
"""How many confused pairs are shown."""


def render(found: Assessment) -> str:
    """Lay out an assessment for people; `Assessment.as_json` has every row."""
    lines = [f"{'split':20} {found.split}"]
    for name in found.scores.__struct_fields__:
        value = getattr(found.scores, name)
        lines.append(f"{name:20} {value:.4f}" if isinstance(value, float) else f"{name:20} {value}")
    lines.append(f"{'rare_recall':20} {found.rare_recall:.4f}")
    levels = [
        {"taxonomy level": level.level, "groups": str(level.groups), "accuracy [95 %]": str(level.accuracy)}
        for level in found.taxonomy
    ]
    lines += _section(levels)
    lines += _section(_confused_rows(found), len(found.confused))
    lines += _section(_rare_rows(found), sum(entry.images > 0 for entry in found.classes))
    if found.against is not None:
        lines += _against(found.against)
    if found.positive is not None:
        lines += _positive(found.positive)
    if found.unknown is not None:
        lines += _unknown(found.unknown)
    return "\n".join(lines)


def percent(value: float | None) -> str:
    """Write a share in percent; ``-`` for None."""
    return "-" if value is None else f"{value:.1%}"


def _section(rows: Sequence[Mapping[str, str]], total: int | None = None) -> list[str]:
    """Return a table after an empty line, with a note if rows were left out."""
    if not rows:
        return []
    cut = total is not None and total > len(rows)
    return ["", table(rows), *([f"({len(rows)} of {total})"] if cut else [])]


def _confused_rows(found: Assessment) -> list[dict[str, str]]:
    return [
        {"most confused": f"{pair.label} → {pair.predicted}", "images": str(pair.images), "of": str(pair.of)}
        for pair in found.confused[:PAIRS]
    ]


def _rare_rows(found: Assessment) -> list[dict[str, str]]:
    by_name = {entry.name: entry for entry in found.classes}
    rows = []
    for entry in (by_name[name] for name in found.rarest):
        row = {"rarest classes": entry.name}
        if entry.train_images is not None:
            row["to train on"] = str(entry.train_images)
        rows.append(
            row | {"images": str(entry.images), "recall": percent(entry.recall), "precision": percent(entry.precision)}
        )
    return rows


def _against(against: Against) -> list[str]:
    parent = against.comparison.parent
    top1 = Proportion(parent.top1, parent.top1_low, parent.top1_high)
    return ["", f"against {against.model}, top-1 {top1}:", against.comparison.render()]


def _positive(view: PositiveView) -> list[str]:
    rows = [
        {"operating point": name, "found [95 %]": str(point.recall), "threshold": _threshold(point.threshold)}
        for name, point in (
            ("sensitivity at specificity 95 %", view.sensitivity_at_95_specificity),
            ("recall at false rejects 1 %", view.recall_at_1_false_reject),
            ("recall at false rejects 5 %", view.recall_at_5_false_reject),
        )
    ]
    return [
        "",
        f"positive: {', '.join(view.classes)} ({view.positives} images against {view.negatives}),"
        f" ROC AUC {view.roc_auc:.4f}",
        table(rows),
    ]


def _unknown(view: UnknownView) -> list[str]:
    return [
        "",
        f"unknown: {view.images} images in {view.folder}; {view.rejected} rejected at the confidence"
        f" {view.threshold:.4f}, which keeps {view.kept:.1%} of the known; ROC AUC {view.roc_auc:.4f}",
    ]


def _threshold(value: float | None) -> str:
    return "none" if value is None else f"{value:.6g}"
