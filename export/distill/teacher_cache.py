"""What teachers said of a crop, kept in a file for further runs that make the very same crop.

A run's crops follow from its seed, batch size, workers and size, and its teachers' answers from the crops. So students
of several architectures and sizes, or of several lengths of training, that are taught on the same crops share one
teacher's work, which on a small machine is most of the time. This is no cache by image: a crop that differs in one
pixel is asked for anew.

The answers stay in the file; in memory is only where each one lies. A row is read by its place and believed by its key.
It is not mapped: where another process cuts the file short, touching a map kills this one, and a read is just short.
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
_MAGIC = b"edgefg answers 1"
# Bytes of rows in memory while their keys are looked up.
_READ_AT_ONCE = 2**22


class Answers:
    """A file of logits by crop. It grows while it is used, up to its limits; crops beyond them are asked each time.

    Args:
        path: the file; begun where it is absent.
        asked: what decides the answers to a crop (teachers, sizes, temperature); another file's is refused.
        classes: number of logits.
        most_bytes: no row is added that would make the file larger; a larger one is read as it is.
        most_crops: how many crops are known at most.

    Raises:
        DataError: the file cannot be read or written, or holds answers to another question.
    """

    def __init__(
        self, path: Path, asked: str, classes: int, *, most_bytes: int = MOST_BYTES, most_crops: int = MOST_CROPS
    ) -> None:
        self._path = path
        self._row = np.dtype([("key", f"V{_KEY_BYTES}"), ("logits", np.float32, (classes,))])
        self._most_bytes, self._most_crops = most_bytes, most_crops
        # Key of a crop → byte of the file at which its row begins.
        self._known: dict[bytes, int] = {}
        head = _MAGIC + hashlib.sha256(f"{asked} {classes}".encode()).digest()
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
            raise DataError(f"{self._path} holds answers of other teachers or to other crops; give another file")
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
        return DataError(f"cannot keep answers in {self._path}: {error.strerror}")
