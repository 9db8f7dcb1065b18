"""On-disk cache of teacher logits, keyed by a hash of the training crop.

A run's crops follow from its seed, batch size, workers and sizes. Students of several architectures, or with schedules
of several lengths, can therefore share the teacher's work, which takes most of the time on a small machine. A crop that
differs in one pixel has another key.

The logits stay in the file. Memory holds only the position of each row; a row is read at its position and checked
against its key. The file is not memory-mapped: if another process truncates it, accessing the map would kill this
process, whereas a read just returns fewer bytes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from edgefg.errors import DataError

MAX_BYTES = 2**30
"""Largest size of a file: a million crops in 250 classes. If every epoch has new crops, it would grow with the run."""
MAX_CROPS = 2**20
"""Largest number of crops in a file. Memory grows with it, by about 120 bytes per crop."""

_KEY_BYTES = 16
_MAGIC = b"edgefg answers 1"  # the cache's first name
# Bytes of rows that are in memory at once while the keys are read.
_CHUNK = 2**22


class TeacherCache:
    """A file of logits by crop. It grows up to its limits. Teachers compute the logits of further crops every time.

    Args:
        path: the file. It is created if it does not exist.
        identity: what the logits of a crop depend on: teachers, sizes, temperature. A file with another identity is
            refused.
        classes: number of logits.
        max_bytes: no row is added that would make the file larger. A larger file is used as it is.
        max_crops: greatest number of crops.

    Raises:
        DataError: the file cannot be read or written, or has another identity.
    """

    def __init__(
        self, path: Path, identity: str, classes: int, *, max_bytes: int = MAX_BYTES, max_crops: int = MAX_CROPS
    ) -> None:
        self._path = path
        self._row = np.dtype([("key", f"V{_KEY_BYTES}"), ("logits", np.float32, (classes,))])
        self._max_bytes, self._max_crops = max_bytes, max_crops
        # Key of a crop → position of its row in the file.
        self._positions: dict[bytes, int] = {}
        head = _MAGIC + hashlib.sha256(f"{identity} {classes}".encode()).digest()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a+b") as file:
                self._check_head(file, head)
                self._read_keys(file, len(head))
        except OSError as exc:
            raise self._failed(exc) from exc

    def __len__(self) -> int:
        """Return the number of crops."""
        return len(self._positions)

    def __call__(self, crops: torch.Tensor, compute: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Return the logits of crops.

        Args:
            crops: ``uint8 [N, H, W, 3]``.
            compute: computes the logits of those crops that are not in the cache.

        Returns:
            ``float32 [N, classes]``.

        Raises:
            DataError: the file cannot be read or written.
        """
        keys = [hashlib.blake2b(crop.tobytes(), digest_size=_KEY_BYTES).digest() for crop in crops.cpu().numpy()]
        rows = self._read(keys)
        missing = {key: i for i, key in enumerate(keys) if key not in rows}  # a crop that occurs twice is there once
        if missing:
            computed = compute(crops[list(missing.values())]).float().cpu().numpy()
            self._append(list(missing), computed)
            rows.update(zip(missing, computed, strict=True))
        return torch.from_numpy(np.stack([rows[key] for key in keys])).to(crops.device)

    def _check_head(self, file: BinaryIO, head: bytes) -> None:
        """Write the head of a new file. Check that of an existing one, and cut off an incomplete row at its end."""
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        found = file.read(len(head))
        if not head.startswith(found):
            raise DataError(f"{self._path} is the cache of other teachers or of other settings. Give another file")
        # A run that was killed may have left a part of a head, or of a row.
        if len(found) < len(head):
            file.truncate(0)
            file.write(head)
            file.flush()
        elif part := (size - len(head)) % self._row.itemsize:
            file.truncate(size - part)

    def _read_keys(self, file: BinaryIO, start: int) -> None:
        """Read which crops are in the file, and where."""
        size = self._row.itemsize
        file.seek(start)
        while rows := file.read(max(1, _CHUNK // size) * size):
            table = np.frombuffer(rows, self._row, count=len(rows) // size)
            for number, key in enumerate(table["key"]):
                if len(self._positions) >= self._max_crops:
                    return
                self._positions[bytes(key)] = start + number * size
            start += len(rows)

    def _read(self, keys: Iterable[bytes]) -> dict[bytes, npt.NDArray[np.float32]]:
        """Return the rows of those crops that are in the file."""
        rows: dict[bytes, npt.NDArray[np.float32]] = {}
        positions = {key: self._positions[key] for key in keys if key in self._positions}
        if not positions:
            return rows
        try:
            with self._path.open("rb", buffering=0) as file:
                for key, position in positions.items():
                    file.seek(position)
                    row = file.read(self._row.itemsize)
                    if len(row) == self._row.itemsize and row.startswith(key):
                        rows[key] = np.frombuffer(row, np.float32, offset=_KEY_BYTES)
        except OSError as exc:
            raise self._failed(exc) from exc
        return rows

    def _append(self, keys: Sequence[bytes], rows: npt.NDArray[np.float32]) -> None:
        """Append as many rows to the file as there is room for."""
        size = self._row.itemsize
        try:
            with self._path.open("ab") as file:
                room = min((self._max_bytes - file.tell()) // size, self._max_crops - len(self._positions))
                if room <= 0:
                    return
                table = np.empty(min(len(keys), room), self._row)
                table["key"] = [np.void(key) for key in keys[:room]]
                table["logits"] = rows[:room]
                file.write(table.tobytes())
                file.flush()
                # The position is known only now: another process may have appended rows in the meantime.
                start = file.tell() - table.nbytes
        except OSError as exc:
            raise self._failed(exc) from exc
        self._positions.update((key, start + number * size) for number, key in enumerate(keys[:room]))

    def _failed(self, error: OSError) -> DataError:
        return DataError(f"cannot use the teacher cache {self._path}: {error.strerror}")
