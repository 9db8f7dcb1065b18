"""Memory of the simulated device, and page-locked memory of its host.

Device addresses are made up: they are no memory of this process, and none is given twice, so that whatever was freed
or belongs to the host is told apart with certainty. Page-locked memory is real; when freed it is overwritten and kept
for a while, so that a late reader gets wrong data, not a crash.
"""

from __future__ import annotations

import bisect
from collections import deque

import numpy as np

from tests.simulated.books import Books

_FIRST_ADDRESS = 0x5_0000_0000_0000  # beyond what Linux gives to a process
_ALIGNMENT, _PAGE = 512, 4096
_KEPT = 256 << 20
FRESH, STALE = 0xCD, 0xDD


class Allocation:
    """One piece of memory."""

    __slots__ = ("address", "array", "device", "freed", "pinned", "size")

    def __init__(self, array: np.ndarray, address: int, device: int, pinned: bool) -> None:
        self.array, self.address, self.device, self.pinned = array, address, device, pinned
        self.size = array.nbytes
        self.freed = False

    def view(self, address: int, size: int) -> np.ndarray:
        """Return the bytes at an address in this allocation."""
        start = address - self.address
        return self.array[start : start + size]


class Memory:
    """All allocations, by address."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self._next = _FIRST_ADDRESS
        self._live: dict[int, Allocation] = {}
        self._order: list[int] = []
        self._freed: set[int] = set()
        self._kept: deque[Allocation] = deque()

    def allocate(self, size: int, device: int, *, pinned: bool) -> Allocation:
        """Allocate, filled with a pattern, since fresh memory holds anything."""
        kind = "pinned" if pinned else "device"
        with self._books.lock:
            if pinned:
                whole = np.empty(size + _PAGE, np.uint8)
                start = -whole.ctypes.data % _PAGE
                array = whole[start : start + size]
                address = array.ctypes.data
            else:
                array, address = np.empty(size, np.uint8), self._next
                self._next += -(-size // _ALIGNMENT) * _ALIGNMENT + _PAGE  # a gap, so that an overrun hits nothing
            array[:] = FRESH
            allocation = Allocation(array, address, device, pinned)
            self._live[address] = allocation
            bisect.insort(self._order, address)
        self._books.count(f"{kind} memory", 1)
        self._books.weigh(kind, size)
        return allocation

    def release(self, address: int, *, pinned: bool) -> Allocation | None:
        """Free the allocation that begins at an address; None where none of that kind does."""
        with self._books.lock:
            allocation = self._live.get(address)
            if allocation is None or allocation.pinned != pinned:
                return None
            del self._live[address]
            self._order.remove(address)
            self._freed.add(address)
            self._keep(allocation)
        kind = "pinned" if pinned else "device"
        self._books.count(f"{kind} memory", -1)
        self._books.weigh(kind, -allocation.size)
        return allocation

    def _keep(self, allocation: Allocation) -> None:
        allocation.freed = True
        allocation.array[:] = STALE
        if allocation.pinned:
            self._kept.append(allocation)
            while sum(kept.size for kept in self._kept) > _KEPT:
                self._kept.popleft()

    def find(self, address: int, size: int) -> Allocation | None:
        """Return the allocation that holds ``size`` bytes at an address."""
        found = self._live.get(address)
        if found is None:
            found = self._around(address)
        return found if found is not None and address + size <= found.address + found.size else None

    def _around(self, address: int) -> Allocation | None:
        with self._books.lock:
            place = bisect.bisect_right(self._order, address) - 1
            found = self._live[self._order[place]] if place >= 0 else None
        return found if found is not None and address < found.address + found.size else None

    def describe(self, address: int, size: int) -> str:
        """Say what lies at an address that `find` did not find."""
        found = self._live.get(address) or self._around(address)
        if found is not None:
            left = found.address + found.size - address
            return f"{size} bytes out of bounds: only {left} are allocated from {address:#x}"
        if address in self._freed:
            return f"memory that was freed ({address:#x})"
        if not address:
            return "a null pointer"
        return f"memory that is neither the device's nor page-locked ({address:#x})"
