"""The pages themselves: length of paragraphs and sentences, pictures, links, and facts copied from the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edgefg.artifact.manifest import Manifest
from tests.conftest import ROOT
from tests.docs.pages import pages, pyproject

PAGES = [*pages(), ROOT / "CHANGELOG.md"]
EXPERIMENTS = ROOT / "docs" / "experiments"


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def paragraphs(text: str) -> list[str]:
    """Return paragraphs and list items as plain text, without code blocks, tables, headings and comments."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"<!--.*?-->|^:::.*(?:\n    .*)*", "", text, flags=re.MULTILINE)
    found = []
    for part in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", text):
        plain = " ".join(part.split())
        if plain and not plain.startswith(("#", "|", "!")):
            plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", plain)
            found.append(re.sub(r"^(?:[-*]|\d+\.) ", "", plain))
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paragraphs_are_short(page: Path) -> None:
    long = [part for part in paragraphs(page.read_text(encoding="utf-8")) if len(part.split()) > 60]
    assert not long


@pytest.mark.parametrize("page", [page for page in pages() if page.parent != EXPERIMENTS], ids=name_of)
def test_sentences_are_simple(page: Path) -> None:
    """At most two commas in a sentence, besides those in code and parentheses."""
    heavy = []
    for part in paragraphs(page.read_text(encoding="utf-8")):
        plain = re.sub(r"`[^`]*`|\([^)]*\)", "X", part)
        plain = re.sub(r"(?<=\d),(?=\d)", "", plain)
        heavy += [sentence for sentence in re.split(r"(?<=[.:?!;]) ", plain) if sentence.count(",") > 2]
    assert not heavy


def test_the_readme_is_one_screen_after_the_other() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pictures_and_files_that_are_linked_exist(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent != EXPERIMENTS], ids=name_of)
def test_paths_of_the_repository_exist(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    paths = re.findall(r"`((?:edgefg|export|runtimes|benchmarks|tests|docs|\.ci)/[\w./-]+)`", text)
    removed = {"benchmarks/LOG.md", "runtimes/DEPLOYMENT.md"}
    for path in paths:
        path = re.sub(r"(NAME|PANEL)", "*", path)
        assert list(ROOT.glob(path)) or path in removed, path


def test_the_latency_picture_shows_recorded_figures() -> None:
    bars = re.findall(r'\("[^"]+", "([\d.]+)", "([\d.]*)', (ROOT / "docs/assets/make_latency.py").read_text())
    assert len(bars) == 7
    latency = (EXPERIMENTS / "latency.md").read_text(encoding="utf-8")
    search = (EXPERIMENTS / "search.md").read_text(encoding="utf-8")
    accuracies = {f"{float(figure):.1f}" for figure in re.findall(r"\d\d\.\d\d?", search)}
    for p50, top1 in bars:
        assert f" {p50} " in latency, p50
        assert not top1 or top1 in accuracies, top1


def test_the_layers_of_the_design_are_the_contract() -> None:
    contracts = pyproject()["tool"]["importlinter"]["contracts"]
    expected = next(contract["layers"] for contract in contracts if contract["id"] == "layers")
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- layers: pyproject.toml -->\n```text\n(.*?)```", text, flags=re.DOTALL)
    assert block is not None
    assert [" ".join(line.split()) for line in re.sub(r"\n +", " ", block[1]).splitlines()] == expected


def test_the_manifest_s_fields_are_described() -> None:
    text = (ROOT / "docs" / "artifact.md").read_text(encoding="utf-8")
    fields = re.findall(r"^\| `(\w+)` \|", text.partition("## Manifest")[2].partition("###")[0], flags=re.MULTILINE)
    assert fields == list(Manifest.__struct_fields__)
