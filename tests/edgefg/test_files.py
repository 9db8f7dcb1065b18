"""Atomic writes and locks."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest

from edgefg.files import atomic_file, locked, write_json


def test_a_file_is_there_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model.onnx"
    with atomic_file(target) as temporary:
        temporary.write_bytes(b"half")
        assert not target.exists()
        assert temporary.parent == target.parent
    assert target.read_bytes() == b"half"
    assert [path.name for path in target.parent.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("earlier", [None, b"earlier"])
def test_a_failure_leaves_what_was_there(earlier: bytes | None, tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    if earlier is not None:
        target.write_bytes(earlier)

    def write() -> None:
        with atomic_file(target) as temporary:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == ([] if earlier is None else [earlier])


def test_others_may_read_it_as_the_umask_says(tmp_path: Path) -> None:
    code = """
import os, sys; os.umask(0o027)
from pathlib import Path
from edgefg.files import atomic_file
with atomic_file(Path(sys.argv[1])) as temporary: temporary.write_bytes(b"")
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], check=True)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_json_is_indented_utf_8_with_a_final_newline(tmp_path: Path) -> None:
    class Entry(msgspec.Struct):
        name: str

    write_json(tmp_path / "a.json", Entry("Grünfink"))
    assert (tmp_path / "a.json").read_bytes() == '{\n  "name": "Grünfink"\n}\n'.encode()


def test_the_second_one_waits_for_the_first(tmp_path: Path) -> None:
    order: list[str] = []
    inside, leave = threading.Event(), threading.Event()

    def first() -> None:
        with locked(tmp_path, lambda: order.append("first waits")):
            inside.set()
            leave.wait(30)
            order.append("first leaves")

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(30)

    def waiting() -> None:
        order.append("second waits")
        leave.set()

    with locked(tmp_path, waiting):
        order.append("second is in")
    thread.join()
    assert order == ["second waits", "first leaves", "second is in"]
    assert os.listdir(tmp_path) == []  # noqa: PTH208
