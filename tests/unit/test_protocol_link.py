"""The device's link over scripted transports: greeting, credit, silence, and a race of two connections."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from isthmus.protocol import messages as m
from isthmus.protocol.errors import LinkError, ProtocolError
from isthmus.protocol.limits import LinkLimits
from isthmus.protocol.link import Link
from isthmus.protocol.transport import Refused

LIMITS = LinkLimits(heartbeat_ms=10, silent_intervals=2, connect_ms=200)
HASH = bytes(16)


def welcome(credit: int = 10_000, most: int = 1000, version: int = 1) -> m.Welcome:
    return m.Welcome(version, 1, (), (), m.Limits(most, credit, 10, 64))


class Script:
    """A transport that answers by a function of what was sent."""

    def __init__(self, answer: Callable[[Any], Sequence[m.Message]]) -> None:
        self.answer = answer
        self.sent: list[Any] = []
        self.inbox: deque[list[bytes]] = deque()
        self.broken: LinkError | None = None
        self.closed = False

    def send(self, frames: Sequence[bytes]) -> bool:
        message = m.decode(frames)
        self.sent.append(message)
        self.inbox.extend(m.encode(reply) for reply in self.answer(message))
        return True

    def poll(self, timeout_ms: float, *, sending: bool = False) -> bool:
        if self.broken is not None:
            raise self.broken
        if not self.inbox:
            time.sleep(min(timeout_ms, 2.0) * 1e-3)
        return bool(self.inbox) or sending

    def recv(self) -> list[bytes] | None:
        return self.inbox.popleft() if self.inbox else None

    def close(self) -> None:
        self.closed = True

    def of(self, kind: type) -> list[Any]:
        return [message for message in self.sent if type(message) is kind]


def friendly(message: Any) -> list[m.Message]:
    if isinstance(message, m.Hello):
        return [welcome()]
    return [m.Pong(message.sent_us)] if isinstance(message, m.Ping) else []


def silent(message: Any) -> list[m.Message]:
    return []


def greeted(*answers: Callable[[Any], Sequence[m.Message]]) -> tuple[Link, list[Script]]:
    """A link whose connections answer by these functions, one each, the last one for ever."""
    made: list[Script] = []

    def connect() -> Script:
        made.append(Script(answers[min(len(made), len(answers) - 1)]))
        return made[-1]

    link = Link(connect, LIMITS, agent="test")
    assert isinstance(link.receive(500), m.Welcome)
    return link, made


def until(link: Link, kind: type, seconds: float = 5.0) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if isinstance(message := link.receive(20), kind):
            return message
    raise AssertionError(f"no {kind.__name__} came")


def test_the_link_greets_and_measures() -> None:
    link, made = greeted(friendly)
    assert link.up
    assert made[0].of(m.Hello) == [m.Hello(m.VERSION, m.MIN_VERSION, (), "test")]
    while link.rtt is None:
        assert link.receive(5) is None
    assert link.rtt[1] >= 0.0
    assert len(made) == 1
    link.close()
    assert made[0].closed


def test_an_answering_cloud_is_never_left() -> None:
    link, made = greeted(friendly)
    for _ in range(20):
        link.receive(5)
    time.sleep(0.1)  # the program did something else meanwhile
    for _ in range(20):
        link.receive(5)
    assert link.up
    assert len(made) == 1


def test_a_link_answers_pings() -> None:
    link, made = greeted(friendly)
    made[0].inbox.append(m.encode(m.Ping(77))[0:1])
    link.receive(5)
    assert m.Pong(77) in made[0].sent


def test_what_exceeds_the_credit_waits() -> None:
    link, made = greeted(lambda message: [welcome(credit=120)] if isinstance(message, m.Hello) else friendly(message))
    for position in range(6):
        link.send(m.Rows(1, 1, position, HASH, [1]))
    sent = len(made[0].of(m.Rows))
    assert 1 <= sent < 6
    link.send(m.Cancel(1, 1))
    assert len(made[0].of(m.Cancel)) == 1
    made[0].inbox.append(m.encode(m.Credit(10_000)))
    link.receive(5)
    assert [rows.position for rows in made[0].of(m.Rows)] == [0, 1, 2, 3, 4, 5]


def test_a_message_that_the_cloud_would_not_take_is_refused_here() -> None:
    link, _ = greeted(friendly)
    with pytest.raises(ProtocolError, match="1000"):
        link.send(m.Rows(1, 1, 0, HASH, [2**31] * 500))


def test_a_silent_cloud_is_left_for_a_fresh_connection() -> None:
    link, made = greeted(lambda message: [welcome()] if isinstance(message, m.Hello) else [], friendly)
    link.send(m.Rows(1, 1, 0, HASH, [1]))
    assert until(link, m.Welcome) == welcome()
    assert made[0].closed
    assert link.up
    link.send(m.Ping(1))
    assert made[1].of(m.Rows) == []


def test_an_old_connection_that_speaks_first_wins_the_race() -> None:
    link, made = greeted(friendly, silent)
    link.renew()
    link.receive(1)
    made[0].inbox.append(m.encode(m.Cancel(1, 1)))
    assert isinstance(until(link, m.Cancel), m.Cancel)
    assert made[1].closed
    assert not made[0].closed


def test_a_broken_connection_is_replaced_at_once() -> None:
    link, made = greeted(friendly)
    made[0].broken = LinkError("the cable was cut")
    assert isinstance(until(link, m.Welcome), m.Welcome)
    assert made[0].closed
    assert len(made) == 2


def test_a_cloud_that_forgot_the_connection_is_greeted_again() -> None:
    link, made = greeted(friendly)
    made[0].inbox.append(m.encode(m.Fault(m.Code.VERSION, "there was no Hello")))
    assert isinstance(until(link, m.Welcome), m.Welcome)
    assert len(made) == 2


def test_without_a_cloud_the_link_is_down_and_says_why() -> None:
    class Dead(Script):
        def poll(self, timeout_ms: float, *, sending: bool = False) -> bool:
            raise LinkError("nothing answers")

        def send(self, frames: Sequence[bytes]) -> bool:
            return False

    link = Link(lambda: Dead(silent), LIMITS)
    assert link.receive(30) is None
    assert not link.up
    assert "nothing answers" in str(link.failure)
    link.send(m.Ping(1))  # goes nowhere, and is no error
    link.close()


@pytest.mark.parametrize("code", [m.Code.VERSION, m.Code.NOT_ALLOWED])
def test_a_refusal_is_final(code: m.Code) -> None:
    link = Link(lambda: Script(lambda message: [m.Fault(code, "no", "mend it")]), LIMITS)
    with pytest.raises(Refused, match="no; mend it"):
        link.receive(500)


def test_a_cloud_of_another_version_is_refused() -> None:
    link = Link(lambda: Script(lambda message: [welcome(version=9)]), LIMITS)
    with pytest.raises(Refused, match="version 9"):
        link.receive(500)


def test_limits_check_themselves() -> None:
    with pytest.raises(ProtocolError, match="credit_bytes is 0"):
        LinkLimits(credit_bytes=0)
