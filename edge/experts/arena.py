"""Memory for planes in a hard budget of bytes, which the operating system gets back page by page."""

from __future__ import annotations

import mmap

import numpy as np


class Arena:
    """Places of a few sizes, each wherever it is needed, together never more than the budget.

    Every size has a run of addresses as long as the whole budget; memory stands behind a place only while it is taken,
    or was and is not needed for another size yet. So nothing has to be moved, however sizes come and go.

    Args:
        budget: bytes.
        sizes: of places.
    """

    def __init__(self, budget: int, sizes: set[int]) -> None:
        self.budget = budget
        self.resident = 0  # bytes of places that are taken, or were
        self._strides = {size: -(-size // mmap.PAGESIZE) * mmap.PAGESIZE for size in sizes}
        self._runs = {size: mmap.mmap(-1, max(stride, budget)) for size, stride in self._strides.items()}
        self._starts = {size: np.frombuffer(run, np.uint8).ctypes.data for size, run in self._runs.items()}
        self._given = dict.fromkeys(sizes, 0)  # places of each size that were taken at least once
        self._spare: dict[int, list[int]] = {size: [] for size in sizes}  # with memory behind them
        self._bare: dict[int, list[int]] = {size: [] for size in sizes}  # without

    @property
    def taken(self) -> int:
        """Bytes of places that are taken."""
        return self.resident - sum(self._strides[size] * len(spare) for size, spare in self._spare.items())

    def take(self, size: int) -> int | None:
        """The address of a place, None when the budget is spent."""
        stride = self._strides[size]
        if self._spare[size]:
            return self._spare[size].pop()
        for other, places in self._spare.items():
            while places and self.resident + stride > self.budget:
                self._strip(other, places.pop())
        if self.resident + stride > self.budget:
            return None
        self.resident += stride
        if self._bare[size]:
            return self._bare[size].pop()
        self._given[size] += 1
        return self._starts[size] + (self._given[size] - 1) * stride

    def give(self, size: int, address: int) -> None:
        """Takes a place back."""
        self._spare[size].append(address)

    def _strip(self, size: int, address: int) -> None:
        self._runs[size].madvise(mmap.MADV_DONTNEED, address - self._starts[size], self._strides[size])
        self._bare[size].append(address)
        self.resident -= self._strides[size]
