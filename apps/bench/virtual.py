"""A device's world without a clock of its own: events, a link's two ways, and a cloud with one engine."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from isthmus.apps.bench.shaping import GRAIN_NS, MS, BenchError, Opportunities
from isthmus.split.traces import SEGMENT, Trace

MAX_EVENTS = 20_000_000


@dataclass(frozen=True, slots=True)
class Note:
    """What arrives at the device.

    Attributes:
        tag: of the question or stream that it belongs to.
        count: what it says: drafts taken, or the streamed token's place in the answer.
        took_ms: of the cloud's time, from arrival to answer.
        queue_ms: of that, before work began.
        size: bytes on the wire.
    """

    tag: int
    count: int
    took_ms: float
    queue_ms: float
    size: float


class World:
    """Virtual time in ns. What a device does is plain code that lets time pass; all else are events.

    Attributes:
        now: the time.
        inbox: what has arrived at the device and was not looked at.
    """

    def __init__(self) -> None:
        self.now = 0
        self.inbox: deque[Note] = deque()
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._count = 0

    def at(self, time_ns: int, event: Callable[[], None]) -> None:
        """Something will happen; at the same time, what was said first happens first."""
        self._count += 1
        if self._count > MAX_EVENTS:
            raise BenchError(f"more than {MAX_EVENTS} events", "simulate a shorter time")
        heapq.heappush(self._events, (time_ns, self._count, event))

    def work(self, ms: float) -> None:
        """The device computes."""
        until = self.now + round(ms * MS)
        while self._events and self._events[0][0] <= until:
            self._step()
        self.now = until

    def wait(self, until_ns: int | None = None) -> bool:
        """The device waits for something to arrive, for ever or until a time; whether something did.

        Raises:
            BenchError: nothing will ever arrive.
        """
        while not self.inbox:
            if until_ns is not None and (not self._events or self._events[0][0] > until_ns):
                self.now = max(self.now, until_ns)
                return False
            if not self._events:
                raise BenchError("the device waits for nothing", "this is an error of the simulator")
            self._step()
        return True

    def _step(self) -> None:
        self.now, _, event = heapq.heappop(self._events)
        event()


class Way:
    """One direction of a link, message by message, with the timing of `shaping.Pipe`: a delay, then a FIFO bottleneck.

    Args:
        delay_ms: one-way delay.
        rate_bps: of the bottleneck in bit/s; None is unlimited.
        trace: opportunities in place of a rate.
        start_ns: when the trace begins; a negative time begins inside of it.
    """

    def __init__(
        self, delay_ms: float, rate_bps: float | None = None, trace: Trace | None = None, start_ns: int = 0
    ) -> None:
        self._delay_ns = round(delay_ms * MS)
        self._rate_bps = rate_bps
        self._places = Opportunities(trace, start_ns) if trace else None
        self._piece = max(int(rate_bps / 8 * GRAIN_NS / 1e9) // SEGMENT, 1) * SEGMENT if rate_bps else 0
        self._free = 0
        self.bytes = 0

    def send(self, now: int, size: int) -> int:
        """Sends a message and says when its last byte arrives; later messages do not change that."""
        at = max(now + self._delay_ns, self._free)
        self.bytes += size
        if self._places:
            while size > 0:
                if not (self._places.left and self._places.time_ns >= at):
                    self._places.reach(at)
                taken = min(size, self._places.left)
                self._places.left -= taken
                size -= taken
                at = self._places.time_ns
        elif self._rate_bps:
            while size > 0:
                taken = min(size, self._piece)
                at += math.ceil(taken * 8e9 / self._rate_bps)
                size -= taken
        self._free = at
        return at


@dataclass(slots=True)
class _Job:
    arrived: int
    price: Callable[[], float | None]
    done: Callable[[int, float, float], None]


class Engine:
    """The cloud's engine: one job at a time, first come first served.

    Attributes:
        busy_ms: that it has worked.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._waiting: deque[_Job] = deque()
        self._busy = False
        self.busy_ms = 0.0

    def submit(self, price: Callable[[], float | None], done: Callable[[int, float, float], None]) -> None:
        """A job arrives.

        Args:
            price: asked when its turn comes: its ms, or None if it is stale and costs nothing.
            done: called at its end with the time, and how many ms it took in all and waited.
        """
        self._waiting.append(_Job(self._world.now, price, done))
        if not self._busy:
            self._next()

    def _next(self) -> None:
        while self._waiting:
            job = self._waiting.popleft()
            ms = job.price()
            if ms is None:
                continue
            self._begin(job, ms)
            return

    def _begin(self, job: _Job, ms: float) -> None:
        self._busy = True
        self.busy_ms += ms
        waited = (self._world.now - job.arrived) / MS
        self._world.at(self._world.now + round(ms * MS), lambda: self._end(job, ms + waited, waited))

    def _end(self, job: _Job, took_ms: float, waited_ms: float) -> None:
        self._busy = False
        job.done(self._world.now, took_ms, waited_ms)
        if not self._busy:
            self._next()
