"""On-disk cache of teacher logits, keyed by a hash of the training crop.

A run's crops follow from its seed, batch size, workers and sizes. Students of several architectures, or with schedules
of several lengths, can therefore share the teacher's work, which takes most of the time on a small machine. A crop that
differs in one pixel is a different key.

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

MOST_BYTES = 2**30
"""Of a file. Where every epoch has new crops, it would grow with the run: this is as much as a search may well leave on
a disk without asking, and holds a million crops in 250 classes."""
MOST_CROPS = 2**20
"""Known of a file. With few classes its rows are short, and what grows is memory: about 120 bytes a crop."""

_KEY_BYTES = 16
_MAGIC = b"edgefg answers 1"  # the first name of this format
# Bytes of rows in memory while their keys are looked up.
_READ_AT_ONCE = 2**22


class TeacherCache:
    """A file of logits by crop. It grows while it is used, up to its limits; crops beyond them are asked each time.

    Args:
        path: the file; begun where it is absent.
        identity: what the logits of a crop depend on: teachers, sizes, temperature. A file
            with another identity is refused.
        classes: number of logits.
        most_bytes: no row is added that would make the file larger; a larger one is read as it is.
        most_crops: how many crops are known at most.

    Raises:
        DataError: the file cannot be read or written, or has another identity.
    """

    def __init__(
        self, path: Path, identity: str, classes: int, *, most_bytes: int = MOST_BYTES, most_crops: int = MOST_CROPS
    ) -> None:
        self._path = path
        self._row = np.dtype([("key", f"V{_KEY_BYTES}"), ("logits", np.float32, (classes,))])
        self._most_bytes, self._most_crops = most_bytes, most_crops
        # Key of a crop → byte of the file at which its row begins.
        self._known: dict[bytes, int] = {}
        head = _MAGIC + hashlib.sha256(f"{identity} {classes}".encode()).digest()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a+b") as file:
                self._begin(file, head)
                self._look_up(file, len(head))
        except OSError as exc:
            raise self._failed(exc) from exc

    def __len__(self) -> int:
        """Return how many crops are known."""
        return len(self._known)

    def __call__(self, crops: torch.Tensor, ask: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Return the logits, ``float32 [N, classes]``, of ``uint8 [N, H, W, 3]``; ``ask`` is asked for new crops alone.

        Raises:
            DataError: the file cannot be read or written.
        """
        keys = [hashlib.blake2b(crop.tobytes(), digest_size=_KEY_BYTES).digest() for crop in crops.cpu().numpy()]
        rows = self._read(keys)
        new = {key: i for i, key in enumerate(keys) if key not in rows}  # once, where a crop is there twice
        if new:
            said = ask(crops[list(new.values())]).float().cpu().numpy()
            self._keep(list(new), said)
            rows.update(zip(new, said, strict=True))
        return torch.from_numpy(np.stack([rows[key] for key in keys])).to(crops.device)

    def _begin(self, file: BinaryIO, head: bytes) -> None:
        """Write the head of a new file, or make sure that it is the same and that the file ends with a whole row."""
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

    def _look_up(self, file: BinaryIO, start: int) -> None:
        """Learn which crops are in the file, and where."""
        size = self._row.itemsize
        file.seek(start)
        while rows := file.read(max(1, _READ_AT_ONCE // size) * size):
            table = np.frombuffer(rows, self._row, count=len(rows) // size)
            for number, key in enumerate(table["key"]):
                if len(self._known) >= self._most_crops:
                    return
                self._known[bytes(key)] = start + number * size
            start += len(rows)

    def _read(self, keys: Iterable[bytes]) -> dict[bytes, npt.NDArray[np.float32]]:
        """Return the rows of those crops that are in the file."""
        rows: dict[bytes, npt.NDArray[np.float32]] = {}
        places = {key: self._known[key] for key in keys if key in self._known}
        if not places:
            return rows
        try:
            with self._path.open("rb", buffering=0) as file:
                for key, place in places.items():
                    file.seek(place)
                    row = file.read(self._row.itemsize)
                    if len(row) == self._row.itemsize and row.startswith(key):
                        rows[key] = np.frombuffer(row, np.float32, offset=_KEY_BYTES)
        except OSError as exc:
            raise self._failed(exc) from exc
        return rows

    def _keep(self, keys: Sequence[bytes], rows: npt.NDArray[np.float32]) -> None:
        """Add as many rows to the file as there is room for."""
        size = self._row.itemsize
        try:
            with self._path.open("ab") as file:
                room = min((self._most_bytes - file.tell()) // size, self._most_crops - len(self._known))
                if room <= 0:
                    return
                table = np.empty(min(len(keys), room), self._row)
                table["key"] = [np.void(key) for key in keys[:room]]
                table["logits"] = rows[:room]
                file.write(table.tobytes())
                file.flush()
                # Where they came to lie: another process may have added its own in the meantime.
                start = file.tell() - table.nbytes
        except OSError as exc:
            raise self._failed(exc) from exc
        self._known.update((key, start + number * size) for number, key in enumerate(keys[:room]))

    def _failed(self, error: OSError) -> DataError:
        return DataError(f"cannot use the teacher cache {self._path}: {error.strerror}")
