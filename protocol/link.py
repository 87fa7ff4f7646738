"""A device's link to its cloud: greeting, heartbeats, credits, and a fresh connection when the old one falls silent."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from isthmus.protocol.address import check_address
from isthmus.protocol.errors import LinkError, ProtocolError
from isthmus.protocol.keys import DeviceKeys
from isthmus.protocol.limits import LIMITS, LinkLimits
from isthmus.protocol.messages import (
    MIN_VERSION,
    VERSION,
    Cancel,
    Close,
    Code,
    Credit,
    Fault,
    Hello,
    Message,
    Ping,
    Pong,
    Welcome,
    agree,
    decode,
    encode,
)
from isthmus.protocol.transport import DealerTransport, Refused, Transport

_RACE_POLL_MS = 5.0
_RETRY_FIRST_S, _RETRY_MOST_S = 0.05, 2.0
_GREETING_S = 1.0
_PROBES = 127  # names of probes, of one byte each; other pings are named after the time, in microseconds


class Link:
    """Sends and receives messages; used by one thread.

    Whenever `receive` gives a Welcome the connection is a new one: nothing sent before counts any more, and sessions
    are to be opened again with a higher epoch. Pings, pongs and credits are dealt with inside.

    Args:
        connect: makes a fresh transport.
        limits: what this side waits for.
        agent: says who this is, for the cloud's log.

    Attributes:
        welcome: the cloud's greeting, None before the first.
        rtt: which Ping was answered last (its `sent_us`) and its round trip in ms, None before the first.
        probed: when the last probe that was answered was sent, and when its answer was read; None before the first.
        bytes_up, bytes_down: payload so far.
    """

    def __init__(self, connect: Callable[[], Transport], limits: LinkLimits = LIMITS, *, agent: str = "") -> None:
        self._connect = connect
        self._limits = limits
        self._agent = agent
        self._main: Transport | None = None
        self._fresh: Transport | None = None
        self._fresh_since = self._next_try = 0.0
        self._greeted_s = 0.0  # what it took to be greeted, the last time, or more if that was too little since
        self._greeted = False
        self._retry_s = _RETRY_FIRST_S
        self._heard = self._pinged = 0.0
        self._probe, self._probes = 0, dict[int, float]()  # the name of the last one, and when each was sent
        self._asked: float | None = None  # when the first Ping without a sign of life since was sent
        self._credit = 0
        self._waiting: deque[tuple[Message, list[bytes], int]] = deque()
        self._failure: LinkError | None = None
        self.welcome: Welcome | None = None
        self.rtt: tuple[int, float] | None = None
        self.probed: tuple[float, float] | None = None
        self.bytes_up = self.bytes_down = 0

    @property
    def up(self) -> bool:
        """Whether there is a connection and the cloud answers its pings."""
        return self._main is not None and not self._silent(time.monotonic())

    @property
    def heard_s(self) -> float:
        """When the cloud last gave a sign of life, by `time.monotonic`."""
        return self._heard

    @property
    def asked_s(self) -> float | None:
        """When the first Ping since then was sent; None when there was none."""
        return self._asked

    @property
    def failure(self) -> LinkError | None:
        """Why the last attempt to connect failed, None while connected."""
        return None if self._main is not None else self._failure

    def send(self, message: Message) -> None:
        """Sends now, or as soon as credit and the connection allow; without a connection the message is dropped.

        Raises:
            ProtocolError: larger than the cloud accepts.
        """
        if self._main is None or self.welcome is None:
            return
        frames = encode(message)
        size = sum(map(len, frames))
        most = self.welcome.limits.max_message_bytes
        if max(map(len, frames)) > most:
            raise ProtocolError(f"a message of {size} bytes, but the cloud accepts {most}", "send fewer rows at once")
        urgent = type(message) in (Cancel, Close, Ping, Pong)
        if (not self._waiting or urgent) and (urgent or size <= self._credit) and self._main.send(frames):
            self._credit -= size
            self.bytes_up += size
        else:
            self._waiting.append((message, frames, size))

    def probe(self) -> None:
        """Asks for a sign of life now, unless a Ping is under way; `probed` tells of the answer, `rtt` does not."""
        now = time.monotonic()
        if self._main is not None and self._asked is None:
            self._probe = self._probe % _PROBES + 1
            self._probes[self._probe] = now
            self._ping(self._main, now, self._probe)

    def receive(self, timeout_ms: float) -> Message | None:
        """The next message for the caller, or None when there was none in time.

        Goes on without raising while the cloud is away (see `up`), trying fresh connections.

        Raises:
            Refused: the cloud refuses this device's key or version.
            ProtocolError: the cloud sent something that is no message.
        """
        deadline = time.monotonic() + timeout_ms * 1e-3
        while True:
            message = self._next()
            if message is not None:
                return message
            now = time.monotonic()
            self._keep_alive(now)
            left_ms = (deadline - now) * 1e3
            if left_ms <= 0.0:
                return None
            self._wait(left_ms)

    def renew(self) -> None:
        """Races a fresh connection against the present one: whichever speaks first stays."""
        if self._fresh is None:
            self._fresh, self._fresh_since, self._greeted = self._connect(), time.monotonic(), False

    def close(self) -> None:
        """Ends the link; messages that wait for credit are lost."""
        self._waiting.clear()
        for transport in (self._main, self._fresh):
            if transport is not None:
                transport.close()
        self._main = self._fresh = None

    def _next(self) -> Message | None:
        while self._main is not None:
            self._flush()
            frames = self._main.recv()
            if frames is None:
                break
            self._heard, self._asked = time.monotonic(), None
            self._drop_fresh()
            message = self._digest(decode(frames), frames)
            if message is not None:
                return message
        return self._greet() if self._fresh is not None else None

    def _digest(self, message: Message, frames: list[bytes]) -> Message | None:
        self.bytes_down += sum(map(len, frames))
        kind = type(message)
        if kind is Credit:
            self._credit += message.granted_bytes  # type: ignore[union-attr]
        elif kind is Ping:
            self.send(Pong(message.sent_us))  # type: ignore[union-attr]
        elif kind is Pong:
            sent_us: int = message.sent_us  # type: ignore[union-attr]
            if sent_us > _PROBES:
                self.rtt = (sent_us, max(0.0, time.monotonic() * 1e3 - sent_us * 1e-3))
            elif (sent_s := self._probes.pop(sent_us, None)) is not None:
                self.probed = (sent_s, time.monotonic())
        elif kind is Fault and message.alias is None and message.code == Code.VERSION:  # type: ignore[union-attr]
            # The cloud has no memory of this connection (it was restarted, or forgot a silent device).
            self._lose(LinkError(message.problem, message.remedy))  # type: ignore[union-attr]
        else:
            return message
        return None

    def _greet(self) -> Message | None:
        assert self._fresh is not None
        if not self._greeted:
            self._greeted = self._fresh.send(encode(Hello(VERSION, MIN_VERSION, (), self._agent)))
        frames = self._fresh.recv()
        if frames is None:
            return None
        message = decode(frames)
        if isinstance(message, Fault):
            self._drop_fresh()
            if message.code in (Code.VERSION, Code.NOT_ALLOWED):
                raise Refused(message.problem, message.remedy)
            self._fail(LinkError(message.problem, message.remedy))
            return None
        if not isinstance(message, Welcome):
            return None
        if agree(message.version, message.version) is None:
            self._drop_fresh()
            raise Refused(f"the cloud speaks protocol version {message.version}, this side {VERSION}", "update one")
        if self._main is not None:
            self._main.close()
        self._main, self._fresh = self._fresh, None
        self._greeted_s = time.monotonic() - self._fresh_since
        self._waiting.clear()
        self.welcome, self._credit = message, message.limits.credit_bytes
        self._heard = self._pinged = time.monotonic()
        self._asked = None
        self._retry_s, self._failure = _RETRY_FIRST_S, None
        return message

    def _flush(self) -> None:
        while self._waiting:
            _, frames, size = self._waiting[0]
            if size > self._credit or self._main is None or not self._main.send(frames):
                return
            self._credit -= size
            self.bytes_up += size
            self._waiting.popleft()

    def _keep_alive(self, now: float) -> None:
        beat_s = self._limits.heartbeat_ms * 1e-3
        if self._main is not None and now - self._heard > beat_s and now - self._pinged > beat_s:
            self._ping(self._main, now, int(now * 1e6))
        if self._fresh is not None and now - self._fresh_since > self._greeting_s():
            self._drop_fresh()
            self._greeted_s *= 2.0  # the link may have become slower
            self._fail(LinkError("the cloud does not answer", "check the address, and that `isthmus serve` runs there"))
        if (self._main is None or self._silent(now)) and now >= self._next_try:
            self.renew()

    def _ping(self, main: Transport, now: float, name: int) -> None:
        self._pinged = now
        self._asked = self._asked or now
        frames = encode(Ping(name))
        size = sum(map(len, frames))
        if main.send(frames):
            self._credit -= size
            self.bytes_up += size

    def _wait(self, left_ms: float) -> None:
        racing = self._main is not None and self._fresh is not None
        if self._main is not None:
            beat_ms = float(self._limits.heartbeat_ms)
            try:
                waits = bool(self._waiting) and self._waiting[0][2] <= self._credit
                self._main.poll(min(left_ms, _RACE_POLL_MS if racing else beat_ms), sending=waits)
            except LinkError as error:
                self._lose(error)
        if self._fresh is not None:
            try:
                most = _RACE_POLL_MS if racing else min(left_ms, 100.0)
                self._fresh.poll(most, sending=not self._greeted)
            except Refused:
                self._drop_fresh()
                raise
            except LinkError as error:
                self._drop_fresh()
                self._fail(error)
        elif self._main is None:
            time.sleep(max(0.0, min(left_ms * 1e-3, self._next_try - time.monotonic(), 0.1)))

    def _silent(self, now: float) -> bool:
        patience_s = self._limits.heartbeat_ms * (self._limits.silent_intervals - 1) * 1e-3
        return self._asked is not None and now - self._asked > patience_s

    def _greeting_s(self) -> float:
        """How long a fresh connection may take: after one that was greeted, one that takes far longer is lost."""
        most_s = self._limits.connect_ms * 1e-3
        return min(most_s, max(_GREETING_S, 4.0 * self._greeted_s)) if self._greeted_s else most_s

    def _drop_fresh(self) -> None:
        if self._fresh is not None:
            self._fresh.close()
            self._fresh = None

    def _lose(self, error: LinkError) -> None:
        if self._main is not None:
            self._main.close()
        self._main, self._next_try, self._failure = None, 0.0, error
        self._waiting.clear()

    def _fail(self, error: LinkError) -> None:
        self._failure = error
        self._next_try = time.monotonic() + self._retry_s
        self._retry_s = min(2.0 * self._retry_s, _RETRY_MOST_S)


def connect(
    address: str, keys: DeviceKeys | None, limits: LinkLimits = LIMITS, *, agent: str = "", wait: bool = True
) -> Link:
    """A link to the cloud at `address`, greeted already unless `wait` is off (then `receive` gives the Welcome).

    Raises:
        LinkError: the address is none, or in the clear and not on this machine; or nothing answered within
            `limits.connect_ms`.
        Refused: the cloud does not know the key, or speaks no common version.
    """
    address = check_address(address, encrypted=keys is not None)
    link = Link(lambda: DealerTransport(address, keys, limits), limits, agent=agent)
    if not wait:
        return link
    deadline = time.monotonic() + limits.connect_ms * 1e-3
    try:
        while (left_s := deadline - time.monotonic()) > 0.0:
            message = link.receive(min(left_s * 1e3, 250.0))
            if isinstance(message, Welcome):
                return link
            if link.failure is not None and left_s < 0.75 * limits.connect_ms * 1e-3:
                break
        raise link.failure or LinkError(f"nothing answers at {address}", "check that `isthmus serve` runs there")
    except BaseException:
        link.close()
        raise
