"""OpenVINO's runtime beyond the contract."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgefg.errors import InferenceError
from edgefg.runtime import load
from tests.conftest import MODELS, TINY


def test_an_error_of_openvino_becomes_an_inference_error() -> None:
    def fail(**_: Any) -> None:
        raise RuntimeError("plugin\n  trouble")

    runtime = load(TINY / MODELS["ir"], threads=1)
    frame = np.zeros((1, 64, 64, 3), np.uint8)
    expected = runtime.infer(frame)
    worker = runtime._requests.queue[0]  # type: ignore[attr-defined]
    request, worker.request = worker.request, SimpleNamespace(infer=fail)
    with pytest.raises(InferenceError, match=r"^OpenVINO failed on model\.xml: plugin trouble$") as caught:
        runtime.infer(frame)
    assert isinstance(caught.value.__cause__, RuntimeError)
    worker.request = request
    np.testing.assert_array_equal(runtime.infer(frame), expected)  # the worker went back to the pool
    runtime.close()
