"""The runtime without a network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgefg.errors import RuntimeUnavailableError
from edgefg.runtime import load


def test_every_frame_gets_the_same_logits(tmp_path: Path) -> None:
    (tmp_path / "a.null").write_text('{"shape": [null, 2, 3, 3], "logits": [1.5, -2]}')
    runtime = load(tmp_path / "a.null")
    assert runtime.input.shape == (None, 2, 3, 3)
    np.testing.assert_array_equal(
        runtime.infer(np.zeros((3, 2, 3, 3), np.uint8)), np.array([[1.5, -2]] * 3, np.float32)
    )
    assert runtime.infer(np.zeros((0, 2, 3, 3), np.uint8)).shape == (0, 2)


@pytest.mark.parametrize("content", ["{", '{"shape": [1, 2, 3], "logits": [1]}', '{"shape": [1, 2, 3, 3]}', "[]"])
def test_what_is_not_a_null_model(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.null").write_text(content)
    with pytest.raises(RuntimeUnavailableError, match=r"a\.null is not a null model"):
        load(tmp_path / "a.null")
