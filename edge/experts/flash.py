"""A flash device as the reader drives it, without one: when each of the reads that are asked for is there.

Reads share one bandwidth and take turns on the reader's threads; each is there some latency after its bytes. Those that
are not urgent are read one at a time and in pieces, so that urgent ones need not wait for them long (see
engine/native/reader.c).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from math import inf

PIECE_MS, LEAST_PIECE, MOST_PIECE = 0.5, 64 << 10, 1 << 20  # of what is not urgent, and its bytes; as in the reader
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

    __slots__ = ("asked", "cell", "left", "size", "urgent")

    def __init__(self, cell: int, size: int, asked: float, urgent: bool) -> None:
        self.cell, self.size, self.left, self.asked, self.urgent = cell, size, size, asked, urgent

    @property
    def begun(self) -> bool:
        return self.left < self.size


class Flash:
    """Reads under way, in milliseconds since the beginning.

    Attributes:
        there: when reads that were begun are done, by the expert's place; whoever knows of one removes it.
        bytes: read or under way.
        dropped: of them, of reads that were taken back before they were done.
    """

    def __init__(self, speed: FlashSpeed) -> None:
        self._speed = speed
        self._ms, self._limit_ms = 1e-3 / speed.mb_s, 1e-3 / speed.limit_mb_s
        self._piece = int(min(MOST_PIECE, max(LEAST_PIECE, PIECE_MS / speed.ms_per_byte)))
        self._urgent, self._idle = deque[_Read](), deque[_Read]()
        self._free = [0.0] * THREADS
        self._current: list[_Read | None] = [None] * THREADS
        self._bus, self._slow_bus = 0.0, 0.0
        self.there: dict[int, float] = {}
        self.bytes = self.dropped = 0

    def ask(self, cell: int, size: int, now: float, *, urgent: bool) -> None:
        """Queues a read."""
        (self._urgent if urgent else self._idle).append(_Read(cell, size, now, urgent))

    def withdraw(self, wanted: Collection[int] = ()) -> list[tuple[int, bool]]:
        """Takes back what is not urgent, but for what has begun and is wanted: that becomes urgent.

        Returns:
            Each with whether it had begun.
        """
        taken, ahead, self._idle = list[_Read](), self._idle, deque[_Read]()
        for read in reversed(ahead):
            if read.begun and read.cell in wanted:
                read.urgent = True
                self._urgent.appendleft(read)
            else:
                taken.append(read)
        for thread, one in enumerate(self._current):
            if one is not None and not one.urgent:
                one.urgent = one.cell in wanted
                if not one.urgent:
                    self._current[thread] = None
                    taken.append(one)
        self.dropped += sum(read.size - read.left for read in taken)
        return [(read.cell, read.begun) for read in taken]

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
        following = [(start, thread) for thread in range(THREADS) if (start := self._start(thread)) <= now]
        if not following or min(following)[0] == inf:
            return False
        start, thread = min(following)
        read = self._current[thread]
        if read is not None and self._makes_way(thread):
            self._idle.appendleft(read)
            read = None
        read = read or (self._urgent or self._idle).popleft()
        piece = read.left if read.urgent else min(read.left, self._piece)
        self._bus = max(self._bus, start) + piece * self._ms
        self._slow_bus = max(self._slow_bus, start) + piece * self._limit_ms
        read.left -= piece
        self.bytes += piece
        self._free[thread] = max(self._bus, self._slow_bus)
        self._current[thread] = read if read.left else None
        if not read.left:
            self.there[read.cell] = max(self._bus + self._speed.latency_ms, self._slow_bus)
        return True

    def _start(self, thread: int) -> float:
        """When a thread begins its next piece; inf if there is none for it."""
        free = self._free[thread]
        if self._current[thread] is not None and not self._makes_way(thread):
            return free
        if self._urgent:
            return max(free, self._urgent[0].asked)
        others = (one for i, one in enumerate(self._current) if i != thread and one is not None)
        return max(free, self._idle[0].asked) if self._idle and all(one.urgent for one in others) else inf

    def _makes_way(self, thread: int) -> bool:
        """Whether what a thread is in the middle of waits for what is urgent."""
        read = self._current[thread]
        return (
            read is not None and not read.urgent and bool(self._urgent) and self._urgent[0].asked <= self._free[thread]
        )
