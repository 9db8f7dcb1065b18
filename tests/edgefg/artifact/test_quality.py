from __future__ import annotations

import numpy as np

from edgefg.artifact.manifest import Accuracy
from edgefg.metrics import score


def test_accuracy_by_hand() -> None:
    logits = np.array([[1, 0], [0, 1], [1, 0], [1, 0]], np.float32)
    found = Accuracy.of(score(logits, np.array([0, 0, 1, 0]), 2), "val of here")
    assert (found.data, found.images, found.top1, found.balanced) == ("val of here", 4, 0.5, 1 / 3)
    assert found.top1_low < 0.5 < found.top1_high
