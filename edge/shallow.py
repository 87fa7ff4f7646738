"""Hidden states of positions that have KV in this device's first layers only: from them the rest is made later."""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

MOST_BYTES = 8 << 20


class ShallowStates:
    """States before a layer, of consecutive positions.

    Args:
        most: bytes that are held; of more, the older ones are forgotten.

    Attributes:
        cut: the layer.
    """

    def __init__(self, most: int = MOST_BYTES) -> None:
        self._most, self._bytes = most, 0
        self._chunks = deque[tuple[int, NDArray[np.float32]]]()
        self.cut = 0

    def add(self, cut: int, position: int, states: NDArray[np.float32]) -> None:
        """States [n, d_model] f32 of `position` and those after it; what is not before them is forgotten."""
        if cut != self.cut:
            self.truncate(0)
        self.cut = cut
        self.truncate(position)
        if self._chunks and self._chunks[-1][0] + len(self._chunks[-1][1]) < position:
            self.truncate(0)
        self._chunks.append((position, states))
        self._bytes += states.nbytes
        while self._bytes > self._most:
            self._bytes -= self._chunks.popleft()[1].nbytes

    def at(self, position: int, most: int) -> NDArray[np.float32] | None:
        """Up to `most` states of a position and those after it, [n, d_model] f32; those before it are forgotten.

        None where the position's is not held.
        """
        while self._chunks and self._chunks[0][0] + len(self._chunks[0][1]) <= position:
            self._bytes -= self._chunks.popleft()[1].nbytes
        if not self._chunks or self._chunks[0][0] > position:
            return None
        begin, states = self._chunks[0]
        return states[position - begin : position - begin + most]

    def truncate(self, length: int) -> None:
        """Forgets positions from `length` on."""
        while self._chunks and self._chunks[-1][0] + len(self._chunks[-1][1]) > length:
            begin, states = self._chunks.pop()
            self._bytes -= states.nbytes
            if begin < length:
                kept = states[: length - begin].copy()
                self._chunks.append((begin, kept))
                self._bytes += kept.nbytes
