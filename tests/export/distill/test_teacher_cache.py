from __future__ import annotations

import errno
import hashlib
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgefg.errors import DataError
from edgefg.export.distill.teacher_cache import TeacherCache

CROPS = torch.arange(4 * 2 * 2 * 3, dtype=torch.uint8).reshape(4, 2, 2, 3)
HEAD, ROW = 48, 24  # bytes; a row is a key of 16 and two logits


class Oracle:
    """TeacherCache with sums of pixels, and counts the crops it was asked about."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, crops: torch.Tensor) -> torch.Tensor:
        self.asked += len(crops)
        sums = crops.flatten(1).float().sum(dim=1)
        return torch.stack([sums, -sums / 3], dim=1)


def test_a_crop_is_asked_about_once_over_all_runs(tmp_path: Path) -> None:
    path, oracle = tmp_path / "kept" / "teacher_cache.bin", Oracle()
    teacher_cache = TeacherCache(path, "a teacher", 2)
    expected = Oracle()(CROPS)
    torch.testing.assert_close(teacher_cache(CROPS[:3], oracle), expected[:3])
    torch.testing.assert_close(teacher_cache(CROPS, oracle), expected)
    again = TeacherCache(path, "a teacher", 2)
    assert len(again) == 4
    torch.testing.assert_close(again(CROPS.flip(0), oracle), expected.flip(0))
    assert oracle.asked == 4
    changed = CROPS.clone()
    changed[0, 0, 0, 0] += 1
    torch.testing.assert_close(again(changed, oracle), Oracle()(changed))
    assert oracle.asked == 5


@pytest.mark.parametrize("lost", [1, 5, 23, 24, 30, 60, 100])
def test_a_file_that_was_cut_off_goes_on_where_it_is_whole(tmp_path: Path, lost: int) -> None:
    path = tmp_path / "teacher_cache.bin"
    TeacherCache(path, "a teacher", 2)(CROPS, Oracle())
    whole = path.read_bytes()
    path.write_bytes(whole[:-lost])
    oracle = Oracle()
    torch.testing.assert_close(TeacherCache(path, "a teacher", 2)(CROPS, oracle), Oracle()(CROPS))
    assert oracle.asked == min(4, -(-lost // 24))
    assert len(path.read_bytes()) == len(whole)


def test_answers_to_another_question_are_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "teacher_cache.bin"
    TeacherCache(path, "a teacher", 2)(CROPS, Oracle())
    before = path.read_bytes()
    for asked, classes in (("another teacher", 2), ("a teacher", 3)):
        with pytest.raises(DataError, match="is the cache of other teachers"):
            TeacherCache(path, asked, classes)
    path.with_name("notes.txt").write_text("my notes")
    with pytest.raises(DataError, match="Give another file"):
        TeacherCache(path.with_name("notes.txt"), "a teacher", 2)
    assert path.read_bytes() == before
    assert path.with_name("notes.txt").read_text() == "my notes"
    with pytest.raises(DataError, match="cannot use the teacher cache"):
        TeacherCache(tmp_path, "a teacher", 2)


def test_a_file_is_read_as_it_was_always_written(tmp_path: Path) -> None:
    path = tmp_path / "teacher_cache.bin"
    asked, key = hashlib.sha256(b"a teacher 2").digest(), hashlib.blake2b(bytes(range(12)), digest_size=16).digest()
    whole = b"edgefg answers 1" + asked + key + np.array([3.5, -1.0], "<f4").tobytes()
    path.write_bytes(whole)
    oracle = Oracle()
    assert TeacherCache(path, "a teacher", 2)(CROPS[:1], oracle).tolist() == [[3.5, -1.0]]
    assert oracle.asked == 0
    assert path.read_bytes() == whole


@pytest.mark.parametrize("limits", [{"max_bytes": HEAD + 2 * ROW + ROW - 1}, {"max_crops": 2}])
def test_a_full_file_grows_no_more_and_other_crops_are_asked_about_each_time(
    tmp_path: Path, limits: dict[str, Any]
) -> None:
    path, oracle, expected = tmp_path / "teacher_cache.bin", Oracle(), Oracle()(CROPS)
    teacher_cache = TeacherCache(path, "a teacher", 2, **limits)
    for asked in (4, 6, 8):
        torch.testing.assert_close(teacher_cache(CROPS, oracle), expected)
        assert (oracle.asked, len(teacher_cache), path.stat().st_size) == (asked, 2, HEAD + 2 * ROW)
    # What was said first is kept, and known to another run.
    torch.testing.assert_close(TeacherCache(path, "a teacher", 2, **limits)(CROPS[:2], oracle), expected[:2])
    assert oracle.asked == 8
    # With more room the file grows on.
    torch.testing.assert_close(TeacherCache(path, "a teacher", 2)(CROPS, oracle), expected)
    assert (oracle.asked, path.stat().st_size) == (10, HEAD + 4 * ROW)


def test_of_a_file_beyond_the_limits_no_more_crops_are_known_than_wanted(tmp_path: Path) -> None:
    path, oracle, expected = tmp_path / "teacher_cache.bin", Oracle(), Oracle()(CROPS)
    TeacherCache(path, "a teacher", 2)(CROPS, Oracle())
    whole = path.read_bytes()
    assert len(TeacherCache(path, "a teacher", 2, max_bytes=HEAD)) == 4
    few = TeacherCache(path, "a teacher", 2, max_crops=3)
    assert len(few) == 3
    torch.testing.assert_close(few(CROPS, oracle), expected)
    assert oracle.asked == 1
    assert path.read_bytes() == whole


def test_no_logits_stay_in_memory(tmp_path: Path) -> None:
    path, classes = tmp_path / "teacher_cache.bin", 10_000
    crops = torch.arange(500, dtype=torch.int32).view(torch.uint8).reshape(500, 1, 2, 2)
    said = torch.zeros(500, classes)
    TeacherCache(path, "a teacher", classes)(crops, lambda new: said)
    tracemalloc.start()
    teacher_cache = TeacherCache(path, "a teacher", classes)
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(teacher_cache) == 500
    assert kept < 1e6 < path.stat().st_size / 10


def test_all_rows_of_a_large_file_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "teacher_cache.bin"
    TeacherCache(path, "a teacher", 2)(CROPS, Oracle())
    for at_once in (1, ROW, 2 * ROW + 1, 3 * ROW):
        monkeypatch.setattr("edgefg.export.distill.teacher_cache._CHUNK", at_once)
        oracle = Oracle()
        torch.testing.assert_close(TeacherCache(path, "a teacher", 2)(CROPS, oracle), Oracle()(CROPS))
        assert oracle.asked == 0


def test_a_crop_that_is_twice_in_a_batch_is_asked_about_and_kept_once(tmp_path: Path) -> None:
    path, oracle = tmp_path / "teacher_cache.bin", Oracle()
    twice = CROPS[[2, 0, 2, 1, 0]]
    teacher_cache = TeacherCache(path, "a teacher", 2)
    for _ in range(2):
        torch.testing.assert_close(teacher_cache(twice, oracle), Oracle()(twice))
        assert (oracle.asked, path.stat().st_size) == (3, HEAD + 3 * ROW)


def test_two_runs_that_write_one_file_read_no_other_s_rows(tmp_path: Path) -> None:
    path, oracle, expected = tmp_path / "teacher_cache.bin", Oracle(), Oracle()(CROPS)
    one, other = TeacherCache(path, "a teacher", 2), TeacherCache(path, "a teacher", 2)
    one(CROPS[:1], oracle)
    other(CROPS[1:3], oracle)
    one(CROPS[3:], oracle)
    for teacher_cache in (one, other, TeacherCache(path, "a teacher", 2)):
        torch.testing.assert_close(teacher_cache(CROPS, oracle), expected)
    assert oracle.asked == 4 + 2 + 2  # what the other had asked, and nothing at last


def test_a_file_that_is_cut_off_or_changed_meanwhile_gives_no_wrong_answer(tmp_path: Path) -> None:
    path, oracle, expected = tmp_path / "teacher_cache.bin", Oracle(), Oracle()(CROPS)
    teacher_cache = TeacherCache(path, "a teacher", 2)
    teacher_cache(CROPS, oracle)
    whole = path.read_bytes()
    # The second row is overwritten, the last one is not whole any more.
    path.write_bytes(whole[: HEAD + ROW] + bytes(ROW) + whole[HEAD + 2 * ROW : -1])
    for asked in (6, 6):
        torch.testing.assert_close(teacher_cache(CROPS, oracle), expected)
        assert oracle.asked == asked
    path.unlink()
    with pytest.raises(DataError, match=r"cannot use the teacher cache .*: No such file"):
        teacher_cache(CROPS, oracle)


def test_on_a_full_disk_the_run_stops_and_nothing_that_is_not_there_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, oracle, expected = tmp_path / "teacher_cache.bin", Oracle(), Oracle()(CROPS)
    teacher_cache = TeacherCache(path, "a teacher", 2)
    teacher_cache(CROPS[:1], oracle)
    opened = Path.open

    class Full:
        """A file of which a part of a row comes to the disk."""

        def __init__(self, file: Any) -> None:
            self._file = file

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: Any) -> None:
            self._file.close()

        def tell(self) -> int:
            place: int = self._file.tell()
            return place

        def write(self, rows: bytes) -> None:
            self._file.write(rows[: ROW + 5])
            raise OSError(errno.ENOSPC, "No space left on device")

    def full(self: Path, mode: str, *options: Any, **more: Any) -> Any:
        file = opened(self, mode, *options, **more)
        return Full(file) if mode == "ab" else file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(DataError, match=r"cannot use the teacher cache .*: No space left") as failure:
            teacher_cache(CROPS, oracle)
    assert isinstance(failure.value.__cause__, OSError)  # by which a search knows that the machine is at fault
    assert len(teacher_cache) == 1
    assert path.stat().st_size == HEAD + 2 * ROW + 5
    # The next run takes what is whole and goes on.
    oracle = Oracle()
    torch.testing.assert_close(TeacherCache(path, "a teacher", 2)(CROPS, oracle), expected)
    assert (oracle.asked, path.stat().st_size) == (2, HEAD + 4 * ROW)
