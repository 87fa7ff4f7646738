"""A flash device as the reader drives it, without one: when each of the reads that are asked for is there.

Reads share one bandwidth and take turns on the reader's threads; each is there some latency after its bytes. Those that
are not urgent are read in pieces, so that urgent ones need not wait for them long (see engine/native/reader.c).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from math import inf

PIECE = 256 << 10  # bytes, as in the reader
THREADS = 2  # that read, as in the store


@dataclass(frozen=True, slots=True)
class FlashSpeed:
    """How fast reads are.

    Attributes:
        mb_s: 10^6 bytes a second of several reads at once.
        latency_ms: what a single read takes beyond its bytes at that speed.
        limit_mb_s: of a slower device that is emulated; inf for none.
    """

    mb_s: float
    latency_ms: float
    limit_mb_s: float = inf

    @property
    def ms_per_byte(self) -> float:
        """Of many reads."""
        return 1e-3 / min(self.mb_s, self.limit_mb_s)


class _Read:
    """Of an expert, by its place in the cache; `left` of its bytes."""

    __slots__ = ("asked", "begun", "cell", "left")

    def __init__(self, cell: int, size: int, asked: float) -> None:
        self.cell, self.left, self.asked, self.begun = cell, size, asked, False


class Flash:
    """Reads under way, in milliseconds since the beginning.

    Attributes:
        there: when reads that were begun are done, by the expert's place; whoever knows of one removes it.
        bytes: read or under way.
    """

    def __init__(self, speed: FlashSpeed) -> None:
        self._speed = speed
        self._ms, self._limit_ms = 1e-3 / speed.mb_s, 1e-3 / speed.limit_mb_s
        self._urgent, self._idle = deque[_Read](), deque[_Read]()
        self._free = [0.0] * THREADS
        self._current: list[_Read | None] = [None] * THREADS
        self._bus, self._slow_bus = 0.0, 0.0
        self.there: dict[int, float] = {}
        self.bytes = 0

    def ask(self, cell: int, size: int, now: float, *, urgent: bool) -> None:
        """Queues a read."""
        (self._urgent if urgent else self._idle).append(_Read(cell, size, now))

    def withdraw(self) -> list[int]:
        """Takes back what is not urgent and has not begun."""
        taken = [read.cell for read in self._idle if not read.begun]
        if taken:
            self._idle = deque(read for read in self._idle if read.begun)
        return taken

    def advance(self, now: float) -> None:
        """Begins whatever begins until then."""
        while self._step(now):
            pass

    def arrival(self, cell: int) -> float:
        """When an expert that was asked for is there, if nothing else is asked for meanwhile."""
        while cell not in self.there:
            if not self._step(inf):
                raise AssertionError(f"nobody asked for {cell}")
        return self.there[cell]

    def _step(self, now: float) -> bool:
        """One thread begins its next piece, not after `now`; whether one did."""
        thread = min(range(THREADS), key=self._free.__getitem__)
        others = [i for i in range(THREADS) if self._current[i] is not None]
        if not self._urgent and not self._idle and others:  # only who is in the middle of something goes on
            thread = min(others, key=self._free.__getitem__)
        start, read, urgent = self._free[thread], self._current[thread], False
        if read is not None and self._urgent and self._urgent[0].asked <= start:
            self._idle.appendleft(read)
            read = self._current[thread] = None
        if read is None:
            queue = self._urgent or self._idle
            if not queue:
                return False
            urgent, read = queue is self._urgent, queue[0]
            start = max(start, read.asked)
            if start > now:
                return False
            queue.popleft()
        elif start > now:
            return False
        piece = read.left if urgent else min(read.left, PIECE)
        self._bus = max(self._bus, start) + piece * self._ms
        self._slow_bus = max(self._slow_bus, start) + piece * self._limit_ms
        read.left -= piece
        read.begun = True
        self.bytes += piece
        self._free[thread] = max(self._bus, self._slow_bus)
        self._current[thread] = read if read.left else None
        if not read.left:
            self.there[read.cell] = max(self._bus + self._speed.latency_ms, self._slow_bus)
        return True
