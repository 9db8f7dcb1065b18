"""The page stands alone, whatever the classes are called."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest

from edgefg.data.split import Sample
from edgefg.errors import DataError
from edgefg.evaluation.assessment import assess
from edgefg.evaluation.page import page, write_page
from edgefg.evaluation.predictions import Predictions


def made(folder: Path, classes: int, images: int, names: tuple[str, ...] | None = None) -> Predictions:
    """Predictions at random of photographs of noise."""
    generator = np.random.default_rng(classes)
    labels = names or tuple(f"class-{i}" for i in range(classes))
    samples = []
    for i in range(images):
        path = folder / f"{i}.png"
        cv2.imwrite(str(path), generator.integers(0, 256, (30, 40, 3), np.uint8))
        samples.append(Sample(path, int(generator.integers(classes))))
    logits = generator.normal(size=(images, classes)).astype(np.float32)
    return Predictions("model.onnx", "test", tuple(samples), logits, labels)


class Resources(HTMLParser):
    """Collects what a page would fetch, and its photographs."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.photos = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe")
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset"):
                self.photos += (value or "").startswith("data:image/jpeg;base64,")
                if not (value or "").startswith(("data:", "#")):
                    self.fetched.append(value or "")


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    found = made(tmp_path, 4, 30)
    other = found._replace(model="fp32.onnx", logits=found.logits[:, ::-1].copy())
    written = tmp_path / "out" / "page.html"
    write_page(
        written,
        assess(found, "birds", other=other, positive=("class-1",), unknown=("blanks", found.logits[:3])),
        found,
        other,
    )
    text = written.read_text(encoding="utf-8")
    resources = Resources()
    resources.feed(text)
    assert resources.fetched == []
    assert resources.photos >= 4
    assert text.count("<svg") == 3
    assert not re.search(r"url\((?!['\"]?#)|@import|http-equiv", text)
    # Colours are the page's own, and no id stands twice.
    assert "var(--accent)" in text
    assert "#010203" not in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_names_are_escaped(tmp_path: Path) -> None:
    names = ('<script>alert("x")</script>', "a & b", "$x_1$", "学习", "n" * 90)
    found = made(tmp_path, 5, 40, names)
    text = page(assess(found, "<data>", positive=(names[0],)), found)
    Resources().feed(text)  # no script tag
    assert "<data>" not in text
    assert "&lt;script&gt;" in text
    assert "a &amp; b" in text
    assert "$x_1$" in text
    assert "学习" in text


@pytest.mark.parametrize(("classes", "images", "drawn"), [(81, 300, 81), (160, 400, 100)])
def test_many_classes(tmp_path: Path, classes: int, images: int, drawn: int) -> None:
    found = made(tmp_path, classes, images)
    text = page(assess(found, "data"), found)
    assert len(text) < 5_000_000
    matrix = text[text.index("Confusion matrix") : text.index("Most confused")]
    assert len(set(re.findall(r">(class-\d+)<", matrix))) == drawn
    assert (f"the {drawn} with most errors" in matrix) == (drawn < classes)


def test_a_perfect_model_has_no_gallery(tmp_path: Path) -> None:
    found = made(tmp_path, 2, 6)
    perfect = found._replace(logits=np.eye(2, dtype=np.float32)[found.targets])
    assert "Most confused" not in page(assess(perfect, "data"), perfect)


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    found = made(tmp_path, 2, 6)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot write"):
        write_page(tmp_path / "file" / "page.html", assess(found, "data"), found)
