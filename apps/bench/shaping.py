"""What a link does to bytes: the profile of a link, and when each byte of one direction is due. No socket, no clock."""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from isthmus.protocol.errors import IsthmusError
from isthmus.split.traces import SEGMENT, Trace, mean_rate, named_pair

MS = 1_000_000  # nanoseconds
MAX_DELAY_MS = 60_000
GRAIN_NS = MS // 4  # a fast link is served in pieces that take this long, not one by one
T = TypeVar("T")


class BenchError(IsthmusError):
    """A link that cannot be emulated as asked, or figures that cannot be used."""


@dataclass(frozen=True, slots=True)
class LinkProfile:
    """A link between a device (which sends up) and a cloud (which sends down).

    Only payload counts: a real link also carries 40 bytes or more of headers with each segment.
    What is under way is not bounded: an unlimited rate with a long delay holds all that is sent in that time.

    Attributes:
        delay_up_ms: one-way delay from device to cloud, in ms.
        delay_down_ms: one-way delay from cloud to device, in ms.
        rate_up_bps: rate from device to cloud, in bit/s; None is unlimited.
        rate_down_bps: rate from cloud to device, in bit/s; None is unlimited.
        jitter_ms: each chunk is delayed by up to this much more, evenly drawn; nothing overtakes, as in TCP.
        trace_up: delivery opportunities from device to cloud, in place of a rate.
        trace_down: delivery opportunities from cloud to device, in place of a rate.
        queue_bytes: bytes that wait for each direction's rate or trace; when they are reached, the sender waits.
        seed: of the jitter.

    Raises:
        BenchError: a value out of bounds, or both a rate and a trace for one direction.
    """

    delay_up_ms: float = 0.0
    delay_down_ms: float = 0.0
    rate_up_bps: int | None = None
    rate_down_bps: int | None = None
    jitter_ms: float = 0.0
    trace_up: Trace | None = None
    trace_down: Trace | None = None
    queue_bytes: int = 256 * 1024
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("delay_up_ms", "delay_down_ms", "jitter_ms"):
            value = getattr(self, name)
            if not (math.isfinite(value) and 0 <= value <= MAX_DELAY_MS):
                raise BenchError(f"{name} is {value}", f"give 0 to {MAX_DELAY_MS} ms")
        for way in ("up", "down"):
            rate = getattr(self, f"rate_{way}_bps")
            if rate is not None and not (math.isfinite(rate) and rate >= 1):
                raise BenchError(f"rate_{way}_bps is {rate}", "give 1 bit/s or more, or None for no limit")
            if rate is not None and getattr(self, f"trace_{way}") is not None:
                raise BenchError(f"both rate_{way}_bps and trace_{way} are given", "choose one of them")
        if self.queue_bytes < SEGMENT:
            raise BenchError(f"queue_bytes is {self.queue_bytes}", f"give {SEGMENT} or more, one segment")

    @classmethod
    def of_rtt(cls, rtt_ms: float, **rest: Any) -> LinkProfile:
        """A profile with half of a round-trip time, in ms, each way; `rest` are the other attributes."""
        return cls(delay_up_ms=rtt_ms / 2, delay_down_ms=rtt_ms / 2, **rest)

    @classmethod
    def of_traces(cls, prefix: str | Path, rtt_ms: float = 0.0, **rest: Any) -> LinkProfile:
        """A profile that replays PREFIX.up and PREFIX.down, or a synthetic link (see `traces.named_pair`).

        `rest` are the other attributes.

        Raises:
            TraceError: a trace cannot be read.
            BenchError: a value is out of bounds.
        """
        up, down = named_pair(prefix)
        return cls.of_rtt(rtt_ms, trace_up=up, trace_down=down, **rest)

    @property
    def rtt_ms(self) -> float:
        """Both delays together, in ms."""
        return self.delay_up_ms + self.delay_down_ms

    def describe(self) -> dict[str, object]:
        """The profile for a result file: traces by name, with their mean rate as the direction's, in bit/s."""
        told: dict[str, object] = {}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            told[name] = value.name if isinstance(value, Trace) else value
            if isinstance(value, Trace):
                told[f"mean_{name.removeprefix('trace_')}_bps"] = round(mean_rate(value))
        return told


class Opportunities:
    """A place in a repeating trace that begins at `start_ns`."""

    def __init__(self, trace: Trace, start_ns: int) -> None:
        self._times = trace.times_ms
        self._period_ns = trace.period_ms * MS
        self._start_ns = start_ns
        self._index, self._cycle = 0, 0
        self.left = SEGMENT  # bytes of the opportunity at this place

    @property
    def time_ns(self) -> int:
        return self.ahead(0)

    def ahead(self, count: int) -> int:
        """Time of the opportunity that is `count` further on."""
        cycles, index = divmod(self._index + count, len(self._times))
        return self._start_ns + (self._cycle + cycles) * self._period_ns + self._times[index] * MS

    def reach(self, ready_ns: int) -> None:
        """Goes on to the first opportunity, from here on, at `ready_ns` or later; those in between are lost."""
        if not self.left:
            self._index, self.left = self._index + 1, SEGMENT
            if self._index == len(self._times):
                self._index, self._cycle = 0, self._cycle + 1
        if self.time_ns < ready_ns:
            self.seek(ready_ns)

    def seek(self, ready_ns: int) -> None:
        """Goes to the first opportunity at `ready_ns` or later, be it before this place."""
        self.left = SEGMENT
        self._cycle, into_ns = divmod(max(ready_ns - self._start_ns, 0), self._period_ns)
        if not into_ns and self._cycle:  # the last time of a period is also time 0 of the next
            self._cycle, into_ns = self._cycle - 1, self._period_ns
        self._index = bisect_left(self._times, -(-into_ns // MS))


class _Chunk(Generic[T]):
    """Bytes on their way, or the rest of them: when at the bottleneck, from where in what arrived, and where to."""

    __slots__ = ("data", "offset", "ready", "to")

    def __init__(self, ready: int, offset: int, data: memoryview, to: T) -> None:
        self.ready, self.offset, self.data, self.to = ready, offset, data, to

    def cut(self, size: int) -> tuple[_Chunk[T], _Chunk[T]]:
        first = _Chunk(self.ready, self.offset, self.data[:size], self.to)
        return first, _Chunk(self.ready, self.offset + size, self.data[size:], self.to)

    @property
    def packets(self) -> int:
        """Segments of the whole that begin in these bytes."""
        return -(-(self.offset + len(self.data)) // SEGMENT) + -self.offset // SEGMENT


class Pipe(Generic[T]):
    """One direction of a link: says when each chunk is due, given every arrival.

    The bottleneck stands at the far end: a chunk comes to it `delay` after its arrival and leaves when all before it
    have left and the rate, or the trace, allows. Served is in order, in pieces, so that part of a chunk may come out.
    All times are ns of one clock that never goes back. Chunks of no bytes are marks: they keep their place and use
    no rate.

    Attributes:
        queued: bytes that wait for the bottleneck; those that are only under way do not count.
        bytes: bytes that came out.
        packets: segments that came out: each chunk is cut into segments of 1,500 bytes and a shorter one.
    """

    def __init__(
        self,
        delay_ms: float = 0.0,
        *,
        rate_bps: float | None = None,
        trace: Trace | None = None,
        jitter_ms: float = 0.0,
        queue_bytes: int = 256 * 1024,
        seed: int = 0,
        start_ns: int = 0,
    ) -> None:
        self._delay_ns = round(delay_ms * MS)
        self._jitter_ns = round(jitter_ms * MS)
        self._random = random.Random(seed)
        self._rate_bps = rate_bps
        self._piece = max(int(rate_bps / 8 * GRAIN_NS / 1e9) // SEGMENT, 1) * SEGMENT if rate_bps else 0
        self._places = Opportunities(trace, start_ns) if trace else None
        self._bound = queue_bytes
        self._waiting: deque[_Chunk[T]] = deque()
        self._under_way: deque[tuple[int, _Chunk[T]]] = deque()  # (due, piece)
        self._head: tuple[int, int] | None = None  # (due, bytes) of the next piece, once decided
        self._last_ready = self._free = start_ns
        self._stalled = False
        self.queued = self.bytes = self.packets = 0

    @property
    def room(self) -> int:
        """Bytes that the queue still takes; what is pushed beyond them is taken all the same."""
        return max(self._bound - self.queued, 0)

    def push(self, now: int, data: memoryview, to: T) -> None:
        """A chunk arrives."""
        ready = now + self._delay_ns
        if self._jitter_ns:
            ready += self._random.randrange(self._jitter_ns + 1)
        self._last_ready = ready = max(ready, self._last_ready)
        self._waiting.append(_Chunk(ready, 0, data, to))
        self.queued += len(data)

    def serve(self, now: int) -> None:
        """Takes from the queue what will have left the bottleneck within the delay: later arrivals change nothing."""
        horizon = now + self._delay_ns
        while self._waiting and not self._stalled:
            due, size = self._next_piece()
            if due > horizon:
                return
            piece = self._waiting.popleft()
            if size < len(piece.data):
                piece, rest = piece.cut(size)
                self._waiting.appendleft(rest)
            if self._places and size:
                self._places.left -= size
            self._under_way.append((due, piece))
            self.queued -= size
            self._free, self._head = due, None

    def pop(self, now: int) -> list[tuple[memoryview, T]]:
        """All that is due."""
        self.serve(now)
        out = []
        while self._under_way and not self._stalled and self._under_way[0][0] <= now:
            _, piece = self._under_way.popleft()
            self.bytes += len(piece.data)
            self.packets += piece.packets
            out.append((piece.data, piece.to))
        return out

    def next_ns(self, room: int = 0) -> int | None:
        """When something is due next, or the queue may have that much room, if earlier. None is never."""
        if self._stalled or not (self._under_way or self._waiting):
            return None
        times = [self._under_way[0][0]] if self._under_way else []
        if self._waiting and (room or not times):
            due, size = self._next_piece()
            more = room - self.room - size  # bytes to leave after this piece
            if room and more > 0 and self._rate_bps:
                due += math.ceil(more * 8e9 / self._rate_bps)
            elif room and more > 0 and self._places:
                due = self._places.ahead(-(-(room - self.room - self._places.left) // SEGMENT))
            times.append(due - self._delay_ns if room else due)
        return min(times)

    def stall(self) -> None:
        """Nothing leaves from now on; what is under way waits before the bottleneck again."""
        self._stalled = True
        while self._under_way:
            _, piece = self._under_way.pop()
            self._waiting.appendleft(piece)
            self.queued += len(piece.data)

    def resume(self, now: int) -> None:
        """The bottleneck serves again, from now on; what it could have served meanwhile is lost."""
        self._stalled = False
        self._restart(now)

    def clear(self, now: int) -> int:
        """Loses everything, and says how many bytes that was."""
        lost = self.queued + sum(len(piece.data) for _, piece in self._under_way)
        self._waiting.clear()
        self._under_way.clear()
        self.queued = 0
        self._restart(now)
        return lost

    def _restart(self, now: int) -> None:
        self._head, self._free = None, now
        if self._places:
            self._places.seek(now)

    def _next_piece(self) -> tuple[int, int]:
        """When the next piece leaves the bottleneck, and its bytes."""
        if self._head is None:
            first = self._waiting[0]
            start, size = max(first.ready, self._free), len(first.data)
            if size and self._rate_bps:
                size = min(size, self._piece)
                start += math.ceil(size * 8e9 / self._rate_bps)
            elif size and self._places:
                if not (self._places.left and self._places.time_ns >= start):
                    self._places.reach(start)
                start, size = self._places.time_ns, min(size, self._places.left)
            self._head = start, size
        return self._head
