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

TRIPS, BURSTS = 20, 7
BURST = 4  # messages of MAX_PADDING bytes that follow each other: about what a cut network sends at once
PAUSE_S = 0.03  # before each, as between inputs: who is left alone for a moment takes longer
ENOUGH_S = 0.5  # a burst that takes so long is not sent again
GREETING_S, ANSWER_S = 5.0, 15.0
_NAMES = 1 << 32  # beyond the names of a link's own pings
_CHECK = "check that `isthmus serve` runs there, and the link"


@dataclass(frozen=True, slots=True)
class Survey:
    """See the module.

    Attributes:
        trip_ms: median of there and back, of a message of some bytes.
        trip_high_ms: its 90 % quantile.
        up_bps, down_bps: bits per second of a burst of messages, of what it takes beyond a trip: also to be enciphered
            and copied.
        welcome: what the cloud says of itself.
    """

    trip_ms: float
    trip_high_ms: float
    up_bps: float
    down_bps: float
    welcome: Welcome


def survey(transport: Transport, clock: Callable[[], float] = time.monotonic) -> Survey:
    """Measures a connection that was not greeted yet; takes some seconds, and half a megabyte each way at most.

    Raises:
        LinkError: nothing answers, or the cloud refuses this device or is too old to be measured.
        ProtocolError: what answers is no cloud.
    """
    asker = _Asker(transport, clock)
    welcome = asker.greet()
    trips = []
    for _ in range(TRIPS):
        trips.append(asker.took_s(1, 0, 0))
    trip_s = statistics.median(trips)
    up, down = (asker.rate(*sizes, trip_s) for sizes in ((MAX_PADDING, 0), (0, MAX_PADDING)))
    return Survey(trip_s * 1e3, statistics.quantiles(trips, n=10)[-1] * 1e3, up, down, welcome)


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

    def rate(self, up: int, down: int, trip_s: float) -> float:
        """Bits per second of messages of so many bytes one way."""
        took = list[float]()
        while len(took) < BURSTS and (not took or took[-1] < ENOUGH_S):
            took.append(self.took_s(BURST, up, down))
        return BURST * (up + down) * 8 / max(statistics.median(took) - trip_s, 1e-6)

    def took_s(self, count: int, up: int, down: int) -> float:
        """From a burst's beginning to its last answer."""
        until = self._clock() + PAUSE_S
        while (left_s := until - self._clock()) > 0:
            self._transport.poll(left_s * 1e3)
        began = self._clock()
        return self.burst(count, up, down)[-1] - began

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
