from __future__ import annotations

from pathlib import Path

import pytest
import torch

from edgefg.errors import DataError
from edgefg.export.answers import Answers

CROPS = torch.arange(4 * 2 * 2 * 3, dtype=torch.uint8).reshape(4, 2, 2, 3)


class Oracle:
    """Answers with sums of pixels, and counts the crops it was asked about."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, crops: torch.Tensor) -> torch.Tensor:
        self.asked += len(crops)
        sums = crops.flatten(1).float().sum(dim=1)
        return torch.stack([sums, -sums / 3], dim=1)


def test_a_crop_is_asked_about_once_over_all_runs(tmp_path: Path) -> None:
    path, oracle = tmp_path / "kept" / "answers.bin", Oracle()
    answers = Answers(path, "a teacher", 2)
    expected = Oracle()(CROPS)
    torch.testing.assert_close(answers(CROPS[:3], oracle), expected[:3])
    torch.testing.assert_close(answers(CROPS, oracle), expected)
    again = Answers(path, "a teacher", 2)
    assert len(again) == 4
    torch.testing.assert_close(again(CROPS.flip(0), oracle), expected.flip(0))
    assert oracle.asked == 4
    changed = CROPS.clone()
    changed[0, 0, 0, 0] += 1
    torch.testing.assert_close(again(changed, oracle), Oracle()(changed))
    assert oracle.asked == 5


@pytest.mark.parametrize("lost", [1, 5, 23, 24, 30, 60, 100])
def test_a_file_that_was_cut_off_goes_on_where_it_is_whole(tmp_path: Path, lost: int) -> None:
    path = tmp_path / "answers.bin"
    Answers(path, "a teacher", 2)(CROPS, Oracle())
    whole = path.read_bytes()
    path.write_bytes(whole[:-lost])
    oracle = Oracle()
    torch.testing.assert_close(Answers(path, "a teacher", 2)(CROPS, oracle), Oracle()(CROPS))
    assert oracle.asked == min(4, -(-lost // 24))
    assert len(path.read_bytes()) == len(whole)


def test_answers_to_another_question_are_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "answers.bin"
    Answers(path, "a teacher", 2)(CROPS, Oracle())
    before = path.read_bytes()
    for asked, classes in (("another teacher", 2), ("a teacher", 3)):
        with pytest.raises(DataError, match="answers of other teachers"):
            Answers(path, asked, classes)
    path.with_name("notes.txt").write_text("my notes")
    with pytest.raises(DataError, match="give another file"):
        Answers(path.with_name("notes.txt"), "a teacher", 2)
    assert path.read_bytes() == before
    assert path.with_name("notes.txt").read_text() == "my notes"
    with pytest.raises(DataError, match="cannot keep answers"):
        Answers(tmp_path, "a teacher", 2)
