"""What teachers said of a crop, kept in a file for further runs that make the very same crop.

A run's crops follow from its seed, batch size, workers and size, and its teachers' answers from the crops. So students
of several architectures and sizes, or of several lengths of training, that are taught on the same crops share one
teacher's work, which on a small machine is most of the time. This is no cache by image: a crop that differs in one
pixel is asked for anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from edgefg.errors import DataError

_KEY_BYTES = 16
_MAGIC = b"edgefg answers 1"


class Answers:
    """A file of logits by crop; it grows while it is used.

    Args:
        path: the file; begun where it is absent.
        asked: what decides the answers to a crop (teachers, sizes, temperature); another file's is refused.
        classes: number of logits.

    Raises:
        DataError: the file cannot be read or written, or holds answers to another question.
    """

    def __init__(self, path: Path, asked: str, classes: int) -> None:
        self._path = path
        self._row = np.dtype([("key", f"V{_KEY_BYTES}"), ("logits", np.float32, (classes,))])
        head = _MAGIC + hashlib.sha256(f"{asked} {classes}".encode()).digest()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            data = path.read_bytes() if path.exists() else b""
            if not head.startswith(data[: len(head)]):
                raise DataError(f"{path} holds answers of other teachers or to other crops; give another file")
            rows = data[len(head) :]
            # A run that was killed may have left a part of a row.
            whole = len(rows) - len(rows) % self._row.itemsize
            with path.open("ab") as file:
                file.truncate(len(head) + whole if rows else 0)
                if not rows:
                    file.write(head)
        except OSError as exc:
            raise DataError(f"cannot keep answers in {path}: {exc.strerror}") from exc
        table = np.frombuffer(rows[:whole], self._row)
        self._known = dict(
            zip((bytes(key) for key in table["key"]), torch.from_numpy(table["logits"].copy()), strict=True)
        )

    def __len__(self) -> int:
        """Return how many crops are known."""
        return len(self._known)

    def __call__(self, crops: torch.Tensor, ask: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Return the logits, ``float32 [N, classes]``, of ``uint8 [N, H, W, 3]``; ``ask`` is asked for new crops alone.

        Raises:
            DataError: the file cannot be written.
        """
        keys = [hashlib.blake2b(crop.tobytes(), digest_size=_KEY_BYTES).digest() for crop in crops.cpu().numpy()]
        new = [i for i, key in enumerate(keys) if key not in self._known]
        if new:
            self._keep([keys[i] for i in new], ask(crops[new]).float().cpu())
        return torch.stack([self._known[key] for key in keys]).to(crops.device)

    def _keep(self, keys: list[bytes], rows: torch.Tensor) -> None:
        table = np.empty(len(keys), self._row)
        table["key"] = [np.void(key) for key in keys]
        table["logits"] = rows.numpy()
        try:
            with self._path.open("ab") as file:
                file.write(table.tobytes())
        except OSError as exc:
            raise DataError(f"cannot keep answers in {self._path}: {exc.strerror}") from exc
        self._known.update(zip(keys, rows, strict=True))
