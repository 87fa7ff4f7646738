"""What a link and the cloud at its other end take, measured by messages that say nothing but how long they are."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from isthmus.protocol.errors import LinkError
from isthmus.protocol.messages import MAX_PADDING, MIN_VERSION, VERSION, Fault, Hello, Message, Ping, Pong, Welcome
from isthmus.protocol.messages import decode as decoded
from isthmus.protocol.messages import encode as encoded
from isthmus.protocol.transport import Transport

TRIPS = 20
BURSTS = (4, 8, 16, 32, 64)  # messages of MAX_PADDING bytes that follow each other
ENOUGH_S = 0.5  # a burst that takes so long is not followed by a longer one
GREETING_S, ANSWER_S = 5.0, 15.0
_NAMES = 1 << 32  # beyond the names of a link's own pings
_CHECK = "check that `isthmus serve` runs there, and the link"


@dataclass(frozen=True, slots=True)
class Survey:
    """See the module.

    Attributes:
        trip_ms: median of there and back, of a message of some bytes.
        trip_high_ms: its 90 % quantile.
        up_bps, down_bps: bits per second of a burst of messages, after its first one.
        welcome: what the cloud says of itself.
    """

    trip_ms: float
    trip_high_ms: float
    up_bps: float
    down_bps: float
    welcome: Welcome


def survey(transport: Transport, clock: Callable[[], float] = time.monotonic) -> Survey:
    """Measures a connection that was not greeted yet; takes some seconds, and 2 MB each way at most.

    Raises:
        LinkError: nothing answers, or the cloud refuses this device or is too old to be measured.
        ProtocolError: what answers is no cloud.
    """
    asker = _Asker(transport, clock)
    welcome = asker.greet()
    trips = []
    for _ in range(TRIPS):
        began = clock()
        asker.burst(1, 0, 0)
        trips.append((clock() - began) * 1e3)
    up, down = (asker.rate(*sizes) for sizes in ((MAX_PADDING, 0), (0, MAX_PADDING)))
    return Survey(statistics.median(trips), statistics.quantiles(trips, n=10)[-1], up, down, welcome)


class _Asker:
    def __init__(self, transport: Transport, clock: Callable[[], float]) -> None:
        self._transport, self._clock, self._count = transport, clock, 0

    def greet(self) -> Welcome:
        until, sent = self._clock() + GREETING_S, False
        while not sent:
            self._transport.poll(50.0, sending=True)
            sent = self._transport.send(encoded(Hello(VERSION, MIN_VERSION, (), "isthmus profile")))
            if not sent and self._clock() >= until:
                raise LinkError("nothing answers", _CHECK)
        while True:
            message = self._next(until)
            if isinstance(message, Welcome):
                return message
            if isinstance(message, Fault):
                raise LinkError(f"the cloud refused: {message.problem}", message.remedy)

    def rate(self, up: int, down: int) -> float:
        """Bits per second of messages of so many bytes one way."""
        found = 0.0
        for count in BURSTS:
            arrived = self.burst(count, up, down)
            took_s = arrived[-1] - arrived[0]
            found = (count - 1) * (up + down) * 8 / max(took_s, 1e-6)
            if took_s >= ENOUGH_S:
                break
        return found

    def burst(self, count: int, up: int, down: int) -> list[float]:
        """When each of so many messages was answered; `up` and `down` are their and their answers' bytes."""
        names = range(self._count + 1, self._count + count + 1)
        self._count += count
        waiting = [encoded(Ping(_NAMES + name, bytes(up), down)) for name in names]
        arrived, until = list[float](), self._clock() + ANSWER_S  # for each
        while len(arrived) < count:
            while waiting and self._transport.send(waiting[0]):
                waiting.pop(0)
            message = self._next(until, sending=bool(waiting))
            if isinstance(message, Pong) and message.sent_us - _NAMES in names:
                if len(message.padding) != down:
                    raise LinkError("this cloud is too old to be measured", "update isthmus there")
                arrived.append(self._clock())
                until = arrived[-1] + ANSWER_S
        return arrived

    def _next(self, until: float, *, sending: bool = False) -> Message | None:
        frames = self._transport.recv()
        if frames is None:
            left_s = until - self._clock()
            if left_s <= 0:
                raise LinkError("the cloud does not answer", _CHECK)
            self._transport.poll(min(left_s, 1.0) * 1e3, sending=sending)
            frames = self._transport.recv()
        return decoded(frames) if frames is not None else None
