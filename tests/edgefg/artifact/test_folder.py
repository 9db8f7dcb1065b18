"""Folders that appear whole or not at all; `test_package` in evaluation has the failures of a whole export."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgefg.artifact.folder import (
    check_target,
    copy_artifact,
    folder_beside,
    move_in,
    remove_stale,
    remove_stale_below,
    swap,
)
from edgefg.errors import ExportError


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def read(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_check_target_takes_what_is_empty(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    check_target(tmp_path / "empty")
    check_target(tmp_path / "absent")


def test_an_artifact_of_every_runtime_may_be_replaced(tmp_path: Path) -> None:
    write(tmp_path, model__xml="", model__bin="", model__onnx="", engine__plan="", engine__engine="", model__json="")
    (tmp_path / "engine.json.sig").touch()
    (tmp_path / "engine.golden.npz").touch()
    check_target(tmp_path)
    (tmp_path / "model.tflite").touch()
    with pytest.raises(ExportError, match=r"is not an artifact \(it holds model\.tflite\)"):
        check_target(tmp_path)


def test_a_folder_beside_goes_also_after_a_failure(tmp_path: Path) -> None:
    def fail() -> None:
        with folder_beside(tmp_path / "out") as temporary:
            write(temporary, model__onnx="half")
            assert temporary.parent == tmp_path
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not list(tmp_path.iterdir())


def test_swap_replaces_the_whole_folder(tmp_path: Path) -> None:
    out = write(tmp_path / "out", model__xml="old", model__json="old")
    with folder_beside(out) as temporary:
        write(temporary, model__onnx="new")
        swap(temporary, out)
    assert read(out) == {"model.onnx": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_move_in_leaves_other_files_and_drops_the_old_signature(tmp_path: Path) -> None:
    out = write(tmp_path / "out", model__onnx="stays", engine__plan="old", engine__json__sig="old")
    staged = write(tmp_path / "staged", engine__plan="new", engine__json="new")
    assert move_in(staged / "engine.plan", out) == out / "engine.plan"
    assert read(out) == {"model.onnx": "stays", "engine.plan": "new", "engine.json": "new"}


def test_move_in_moves_the_manifest_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []
    replace = Path.replace

    def note(self: Path, target: Path) -> Path:
        moved.append(self.name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", note)
    staged = write(tmp_path / "staged", engine__plan="", engine__json="", engine__golden__npz="")
    move_in(staged / "engine.plan", write(tmp_path / "out"))
    assert len(moved) == 3
    assert moved[-1] == "engine.json"


def test_a_copy_replaces_what_was_there(tmp_path: Path) -> None:
    model = write(tmp_path / "a", model__onnx="new", model__json="new") / "model.onnx"
    assert copy_artifact(model, write(tmp_path / "b", model__xml="old")) == tmp_path / "b" / "model.onnx"
    assert read(tmp_path / "b") == read(tmp_path / "a")


def test_only_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    for name in (".engine.plan.0123abcd", ".model.plan.0123abcd", ".engine.plan.old", "deep/.x.0123abcd"):
        write(tmp_path / name, half="x")
    write(tmp_path / "deep" / ".x.0123abcd.old", half="x")
    remove_stale(tmp_path / "engine.plan")
    assert {path.name for path in tmp_path.iterdir()} == {".model.plan.0123abcd", ".engine.plan.old", "deep"}
    remove_stale_below(tmp_path / "deep")
    assert not list((tmp_path / "deep").iterdir())
