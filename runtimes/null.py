"""A runtime without a network, which returns fixed logits from a small JSON file.

It is used to measure the SDK's overhead and to test the core. The model file (``.null``) is JSON:
``{"shape": [1, 224, 224, 3], "logits": [0.1, 2.5]}``; with null as first dimension it takes any batch.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from edgefg.errors import RuntimeUnavailableError
from edgefg.runtime import TensorSpec


class _NullModel(msgspec.Struct, forbid_unknown_fields=True):
    shape: tuple[int | None, int, int, int]
    logits: list[float]


class NullRuntime:
    """Returns the same logits for every frame."""

    companions = ()
    extra = ""
    int8_remedy = ""

    def __init__(self, path: Path, *, threads: int | None = None, device: str | None = None) -> None:
        try:
            model = msgspec.json.decode(path.read_bytes(), type=_NullModel)
        except (OSError, msgspec.DecodeError) as exc:
            raise RuntimeUnavailableError(f"{path} is not a null model ({exc})") from exc
        self.input = TensorSpec(model.shape, "uint8")
        self.version = "null 1"
        self._logits = np.array([model.logits], np.float32)

    def infer(self, batch: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return the fixed logits once per frame, ``float32 [N, classes]``."""
        return np.repeat(self._logits, len(batch), axis=0)

    def close(self) -> None:
        """Do nothing."""
