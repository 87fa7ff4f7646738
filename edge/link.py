"""The blocking driver of a session: one loop over one connection, no threads and no asyncio."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from isthmus.edge.events import Aligned, Answered, Behind, Event, Refused, Served, Streamed, Up, Verified
from isthmus.edge.lane import Lane
from isthmus.edge.quiet import AT_ONCE_S, Quiet
from isthmus.edge.session import Session
from isthmus.edge.watch import GLANCE_S, Watch
from isthmus.protocol import messages as m
from isthmus.protocol.errors import IsthmusError, LinkError, ProtocolError

_AGAIN_S = 0.005  # until what makes this device ready is asked once more, when it is late
LATE_S = 0.1  # what was here already came so long ago at most, as far as is assumed
_ECHO_S = 0.001  # between two looks for a ping's answer that is waited for
_CHECK_S = 0.25  # how often a waiting device looks whether the link is still up


class Wire(Protocol):
    """A connection to a cloud that greets, stays alive and mends itself; `protocol.link.Link` is one."""

    welcome: m.Welcome | None
    rtt: tuple[int, float] | None
    probed: tuple[float, float] | None
    bytes_up: int
    bytes_down: int

    @property
    def up(self) -> bool: ...

    @property
    def heard_s(self) -> float: ...

    @property
    def asked_s(self) -> float | None: ...

    @property
    def failure(self) -> LinkError | None: ...

    def send(self, message: m.Message) -> None: ...

    def receive(self, timeout_ms: float) -> m.Message | None: ...

    def probe(self) -> None: ...

    def renew(self) -> None: ...

    def close(self) -> None: ...


class Restart(Exception):
    """What was under way is void: align the lane and send again."""


class Silent(Exception):
    """The link shows no sign of life; what is under way stays so, and may be waited for again."""


class Link:
    """A session with its connection.

    Args:
        clock: seconds, as `time.monotonic`; simulated links bring their own.
        on_waiting: called with what `Patience.waiting` says, once each time that it begins.

    Attributes:
        idle: does a little of what can be done in the seconds that are left of `hush`, or before `Silent` makes sense;
            after how many it may do more, infinite when all is done.
        on_lane: told of a lane before anything is sent on it.
        watch: sees what goes up and comes down, and when; None for nobody.
        hush: gives the seconds without a sign of life after which waiting ends with `Silent`; None to wait as long as
            the session's patience lasts.
    """

    def __init__(
        self,
        session: Session,
        wire: Wire,
        clock: Callable[[], float] = time.monotonic,
        on_waiting: Callable[[str], None] | None = None,
    ) -> None:
        self.session = session
        self.hush: Callable[[], float] | None = None
        self.idle: Callable[[float], float] | None = None
        self.on_lane: Callable[[Lane], None] | None = None
        self.watch: Watch | None = None
        self._on_waiting = on_waiting
        self._wire, self._clock = wire, clock
        self._looked = clock()  # for messages, the last time, or sent some
        self._life_s = 0.0  # when the last sign of life came
        self._up = self._later = 0  # bytes that had been sent when the one before it came, and when it came
        if wire.welcome is not None:
            session.receive(wire.welcome, clock())

    @property
    def costs(self) -> tuple[int, int, int, int]:
        """Bytes up, bytes down, round trips and microseconds of the cloud's engine so far."""
        return self._wire.bytes_up, self._wire.bytes_down, self.session.round_trips, self.session.cloud_us

    @property
    def heard_s(self) -> float:
        """When the link last showed a sign of life, by the clock."""
        return self._wire.heard_s

    @property
    def max_rows(self) -> int:
        """Rows that the cloud takes in one message."""
        welcome = self.session.welcome
        return max(1, welcome.limits.max_rows) if welcome is not None else 1

    def welcome(self, wait_s: float | None = None) -> m.Welcome | None:
        """The cloud's Welcome; waits for it, or for `wait_s` at most and then gives None.

        What is under way stays so: it may be called in the middle of an answer.

        Raises:
            LinkError: the cloud does not answer.
            IsthmusError: it cannot serve this device.
        """
        session = self.session
        if session.welcome is None:
            session.greet(self._clock())
        deadline = None if wait_s is None else self._clock() + wait_s
        while session.welcome is None:
            event = self._next(deadline)
            if event is None:
                return None
            if isinstance(event, Refused):
                raise event.error
        refused = next((event for event in session.events if isinstance(event, Refused)), None)
        session.events = deque(event for event in session.events if not isinstance(event, Up | Refused))
        if refused is not None:
            self._tell()
            raise refused.error
        return session.welcome

    def glance(self, wait_s: float) -> bool:
        """Whether the cloud is there after all, as far as that shows within a short time."""
        session, until = self.session, self._clock() + wait_s
        while not (self._wire.up and session.welcome is not None and not session.closing):
            message, now = self._listen(until - self._clock())
            if message is not None:
                session.receive(message, now)
            elif now >= until:
                break
        return self._wire.up and not session.closing and self.welcome(0.0) is not None

    def race(self) -> None:
        """Tries a fresh connection beside one that is silent: whichever shows life first is used."""
        self._wire.renew()

    def align(self, lane: Lane, limit: int) -> int:
        """Brings the lane to a prefix of the log of at most `limit` tokens; how many that are."""
        if not (self.session.welcome and lane.check(self.session.log) and lane.ready(limit, self.session.log)):
            self.welcome()
            self.session.align(lane, limit, self._clock())
            if self.on_lane is not None:
                self.on_lane(lane)
            while not (isinstance(event := self._next(), Aligned) and event.lane is lane):
                if isinstance(event, Behind) and event.lane is lane:
                    self.session.align(lane, limit, self._clock())
                elif isinstance(event, Refused):
                    raise event.error
        return lane.ahead

    def rows(self, lane: Lane, rows: m.Rows) -> None:
        """Sends rows; `answer` waits for what they give."""
        self.session.rows(lane, rows, self._clock())
        self.flush()

    def answer(self, lane: Lane, position: int) -> list[int]:
        """The tokens of the rows at `position`.

        Raises:
            Restart: send again what the cloud lacks.
        """
        while True:
            event = self._awaited()
            if isinstance(event, Answered) and event.lane is lane and event.position == position:
                return event.tokens

    def draft(self, lane: Lane, draft: m.Draft, head: bytes) -> None:
        """Sends guesses; `verdict` waits for what becomes of them.

        Args:
            head: chain over the tokens before the first guess.
        """
        self.session.draft(lane, draft, head, self._clock())
        self.flush()

    def fill(self, lane: Lane, fill: m.Fill, tail: bytes) -> None:
        """Sends rows that nobody waits for.

        Args:
            tail: chain over the tokens up to the last of them.
        """
        lane.filled(fill.position + len(fill.tokens), tail)
        self.session.outbox.append(fill)
        self.flush()

    def verdict(self, lane: Lane, wait: bool = True) -> Answered | Verified | None:
        """What the cloud says next of rows or guesses of the lane; None when it has not, and `wait` is off.

        Raises:
            Restart: send again what the cloud lacks.
        """
        while True:
            event = self._awaited() if wait else self._heard()
            if event is None or (isinstance(event, Answered | Verified) and event.lane is lane):
                return event

    def stream(self, lane: Lane) -> Streamed:
        """The next tokens of the lane's stream.

        Raises:
            Restart: begin the stream again after the tokens that came.
        """
        while True:
            event = self._awaited()
            if isinstance(event, Streamed) and event.lane is lane:
                return event

    def serve(self, request: m.GetManifest | m.GetRange) -> m.Manifest | m.Range:
        """Bulk data."""
        self.session.ask(request, self._clock())
        while True:
            event = self._awaited()
            if isinstance(event, Served):
                return event.message

    def generate(self, lane: Lane, request: m.Generate) -> None:
        """Starts a stream."""
        self.session.generate(lane, request, self._clock())
        self.flush()

    def cancel(self, lane: Lane) -> None:
        """Gives up what is under way on a lane, and what came of it and was not read."""
        self.session.cancel(lane)
        self.flush()

    def look(self) -> bool:
        """Takes in what has come, without waiting; whether there was anything for who waits."""
        while True:
            message, came = self._listen(0.0)
            if message is None:
                return bool(self.session.events)
            self.session.receive(message, came)

    def probe(self) -> None:
        """Asks for a sign of life while something else is done, where silence is listened for."""
        if self.hush is not None:
            self._wire.probe()

    def ping(self, size: int = 0) -> int:
        """Asks for a sign of life, with so many bytes more than it needs; its name, as `rtt` gives it."""
        ping = m.Ping(int(self._clock() * 1e6), bytes(size))
        self._wire.send(ping)
        return ping.sent_us

    def echo(self, size: int, wait_s: float) -> int:
        """As `ping`, and waits for its answer, so long at most."""
        name, until = self.ping(size), self._clock() + wait_s
        while (self.rtt is None or self.rtt[0] != name) and (left_s := until - self._clock()) > 0:
            message, now = self._listen(min(left_s, _ECHO_S))
            if message is not None:
                self.session.receive(message, now)
        return name

    @property
    def up(self) -> bool:
        """Whether the cloud shows signs of life."""
        return self._wire.up

    @property
    def rtt(self) -> tuple[int, float] | None:
        """Which ping was answered last, and its round trip in ms."""
        return self._wire.rtt

    def flush(self) -> None:
        """Sends what waits to be sent."""
        outbox = self.session.outbox
        if outbox:
            for message in outbox:
                self._wire.send(message)
                if self.watch is not None:
                    self.watch.sent(message, self._clock())
            outbox.clear()
            self._looked = self._clock()

    def close(self, keep: bool = False) -> None:
        """Ends the connection, and the sessions unless they are to be taken up again."""
        if not keep:
            self.session.close()
        self._tell()
        self._wire.close()

    def _tell(self) -> None:
        """Sends what nobody waits for; lost, it costs the cloud a little: idle sessions it forgets by itself."""
        with suppress(IsthmusError):
            self.flush()

    def _awaited(self) -> Event:
        event = self._heard(None)
        assert event is not None
        return event

    def _heard(self, deadline: float | None = 0.0) -> Event | None:
        event = self._next(deadline)
        if isinstance(event, Refused):
            raise event.error
        if isinstance(event, Behind):
            raise Restart
        return event

    def _listen(self, wait_s: float) -> tuple[m.Message | None, float]:
        """What comes in that time, and when it came, or the time: what was here already came since the last look."""
        began = self._clock()
        message = self._received(max(0.0, wait_s) * 1e3)
        now = self._clock()
        at_once = message is not None and now - began <= AT_ONCE_S
        came = (began + max(self._looked, began - LATE_S)) / 2 if at_once else now
        self._looked = now
        if self._wire.heard_s != self._life_s:
            self._life_s = self._wire.heard_s
            self._up, self._later = self._later, self._wire.bytes_up  # it may be of before what was sent since
        if self.watch is not None and message is not None:
            self.watch.heard(message, came)
        return message, came

    def _received(self, timeout_ms: float) -> m.Message | None:
        try:
            return self._wire.receive(timeout_ms)
        except LinkError:
            raise
        except ProtocolError as error:
            raise LinkError(f"{self.session.where} answers nonsense: {error.problem}", error.remedy) from error

    def _next(self, deadline: float | None = None) -> Event | None:
        session, wire, clock = self.session, self._wire, self._clock
        quiet = None
        if self.hush is not None and deadline is None:
            quiet = Quiet(wire, session.trips, self.hush, lambda: wire.bytes_up - self._up, clock())
        idle = self.idle if quiet is not None else None
        idle_s = math.inf if idle is None else 0.0  # when there is something for it
        while not session.events:
            try:
                self.flush()
                began = clock()
                until = min(session.wake_at, began + (GLANCE_S if self.watch else _CHECK_S))
                if deadline is not None:
                    until = min(until, deadline)
                if quiet is not None:
                    quiet.ask(began)
                    wake_s = quiet.wake_s()
                    until = min(until, idle_s if wake_s <= began and idle_s < math.inf else wake_s)
                looked = self._looked
                message, now = self._listen(min(until, idle_s) - began)
                if quiet is not None:
                    quiet.hear(looked, began)
                    if message is None and idle is not None and now >= idle_s:
                        idle_s = idle(quiet.dark_s() - now) + clock()
                        message, now = self._listen(0.0)  # what came meanwhile, before anything is judged
                        quiet.hear(began, now)
                        if message is None and now < until:
                            continue
            except IsthmusError:
                session.abandon()
                self._tell()
                raise
            if message is not None:
                session.receive(message, now)
            elif deadline is None and not session.events:
                if self.watch is not None and (quiet is None or not quiet.known):
                    self.watch.waits(now)
                if quiet is not None:
                    if quiet.dark(now):
                        if idle_s == math.inf:
                            session.tick(now, wire.up, wire.failure)
                            if session.events:
                                break
                            raise Silent
                        idle_s = min(idle_s, now + _AGAIN_S)  # its time has come earlier than it thought
                    quiet.ask(now)
            if now >= until:
                waited = session.patience.waiting
                session.tick(now, wire.up, wire.failure)
                if session.patience.waiting and not waited and self._on_waiting is not None:
                    self._on_waiting(session.patience.waiting)
                if deadline is not None and now >= deadline and not session.events:
                    return None
        event = session.events.popleft()
        if isinstance(event, Refused):
            self._tell()
        return event
