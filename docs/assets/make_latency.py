"""Draw docs/assets/latency.svg: p50 of the shipped engine beside its teacher and a ResNet-50.

    python docs/assets/make_latency.py

The figures are those of docs/experiments/latency.md ("Lite2 student at 256 px without VNNI") and
docs/experiments/search.md; tests/docs/test_pages.py compares them. Needs the extra ``report``.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt

BARS = (
    ("INT8 student, edgefg", "11.95", "89.1 %"),
    ("FP32 student, OpenVINO", "19.18", "89.5 %"),
    ("FP32 student, eager PyTorch", "42.27", "89.5 %"),
    ("teacher, OpenVINO", "50.8", "89.8 %"),
    ("ResNet-50, OpenVINO", "63.88", ""),
    ("ResNet-50, eager PyTorch", "111.27", ""),
    ("teacher, eager PyTorch", "117.57", "89.8 %"),
)
"""Name, p50 in milliseconds and top-1 on the 2,485 test images, as the pages print them."""
_HIGHLIGHT, _OTHER, _TEXT = "#00897b", "#90a4ae", "#37474f"


def draw(path: Path) -> None:
    """Write the picture as SVG, the same bytes each time."""
    mpl.rcParams.update({"svg.hashsalt": "edgefg", "svg.fonttype": "none", "font.family": "sans-serif"})
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    names, milliseconds = [name for name, _, _ in BARS], [float(p50) for _, p50, _ in BARS]
    colors = [_HIGHLIGHT if "edgefg" in name else _OTHER for name in names]
    axes.barh(names, milliseconds, color=colors, height=0.68)
    axes.invert_yaxis()
    for row, (_, p50, top1) in enumerate(BARS):
        text = f"{float(p50):.0f} ms" + (f"  ·  {top1} top-1" if top1 else "")
        axes.text(float(p50) + 1.5, row, text, va="center", color=_TEXT, fontsize=9)
    axes.set_xlim(0, 150)
    axes.set_xticks([])
    axes.tick_params(left=False, colors=_TEXT)
    axes.set_title(
        "81 look-alike groceries, p50 of one prediction on 2 CPU cores", loc="left", fontsize=10, color=_TEXT
    )
    axes.spines[:].set_visible(False)
    figure.patch.set_facecolor("white")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    draw(Path(__file__).with_name("latency.svg"))
