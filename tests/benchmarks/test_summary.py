from __future__ import annotations

import errno
import os
from pathlib import Path

import msgspec
import pytest

from edgefg import files
from edgefg.benchmarks.summary import Summary, render, summarize, write
from edgefg.errors import DataError
from tests.benchmarks.conftest import MakeArtifact


@pytest.fixture
def summary(null_artifact: MakeArtifact, data: Path) -> Summary:
    artifacts = [("teacher FP32", null_artifact("teacher")), ("student INT8", null_artifact("student"))]
    return summarize(artifacts, data, iterations=4)


def test_table_and_file_say_the_same(summary: Summary, tmp_path: Path) -> None:
    assert (summary.split, [row.name for row in summary.rows]) == ("test", ["teacher FP32", "student INT8"])
    lines = render(summary).splitlines()
    assert lines[0].split() == ["model", "top-1", "[95", "%]", "balanced", "p50", "ms", "p99", "ms", "size", "MB"]
    assert lines[2].startswith("teacher FP32  60.0% [")
    path = tmp_path / "run" / "summary.json"
    write(summary, path)
    assert msgspec.json.decode(path.read_bytes(), type=Summary) == summary


def test_a_full_disk_keeps_the_earlier_summary(
    summary: Summary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    path = folder / "summary.json"
    path.write_text("earlier")

    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(DataError, match=r"summary\.json: No space left"):
        write(summary, path)
    assert path.read_text() == "earlier"
    assert list(folder.iterdir()) == [path]
