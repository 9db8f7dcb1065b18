"""Loops are silent unless a progress bar is in force."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from edgefg.progress import T, progress_shown_by, track


def test_silent_by_default(capfd: pytest.CaptureFixture[str]) -> None:
    assert list(track([1, 2], "counting")) == [1, 2]
    assert capfd.readouterr() == ("", "")


def test_the_bar_in_force_sees_every_loop() -> None:
    seen: list[tuple[str, int | None]] = []

    def bar(items: Iterable[T], description: str, total: int | None) -> Iterable[T]:
        seen.append((description, total))
        return items

    with progress_shown_by(bar):
        assert list(track(range(3), "counting")) == [0, 1, 2]
        assert list(track(iter("ab"), "spelling", 2)) == ["a", "b"]
        assert list(track(iter("ab"), "spelling")) == ["a", "b"]
    assert list(track([1], "after")) == [1]
    assert seen == [("counting", 3), ("spelling", 2), ("spelling", None)]
