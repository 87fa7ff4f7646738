"""What a device hears of a cloud that is inside a long step: over real sockets, the step ends when the test says so."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from isthmus.cloud.attendant import Attendant
from isthmus.cloud.models import serve_part
from isthmus.cloud.service import Service
from isthmus.engine.part import Rows, StepResult
from isthmus.protocol import messages as m
from isthmus.protocol import tensors
from isthmus.protocol.limits import LinkLimits
from isthmus.protocol.link import connect
from isthmus.protocol.transport import DealerTransport, RouterTransport
from tests.cloud_world import PROMPT, SESSION, TEXT, rows
from tests.fakes import FakePart

LIMITS = LinkLimits(max_message_bytes=200_000, credit_bytes=400_000, connect_ms=5000)
WAIT_S = 20.0


class HeldPart(FakePart):
    """A part whose steps wait until they may end."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.go = threading.Event(), threading.Event()

    def step(self, rows: Rows) -> StepResult:
        self.inside.set()
        assert self.go.wait(WAIT_S)
        return super().step(rows)


class Device:
    """A connection without anything that mends it."""

    def __init__(self, address: str) -> None:
        self.wire = DealerTransport(address, None, LIMITS)

    def send(self, message: m.Message) -> None:
        assert self.wire.poll(WAIT_S * 1e3, sending=True)
        assert self.wire.send(m.encode(message))

    def next(self, wait_s: float = WAIT_S) -> Any:
        frames = self.wire.recv() if self.wire.poll(wait_s * 1e3) else None
        return None if frames is None else m.decode(frames)


@pytest.fixture
def part() -> HeldPart:
    return HeldPart()


@pytest.fixture
def device(part: HeldPart) -> Iterator[Callable[[], Device]]:
    transport = RouterTransport("tcp://127.0.0.1:0", None, None, LIMITS)
    address = transport.address
    service = Service([serve_part(part, "aa", "fake")], transport, link_limits=LIMITS)
    thread = threading.Thread(target=service.run)
    thread.start()
    made: list[Device] = []

    def new() -> Device:
        made.append(Device(address))
        return made[-1]

    yield new
    part.go.set()
    service.stop()
    thread.join(WAIT_S)
    assert not thread.is_alive()
    for one in made:
        one.wire.close()


def opened(device: Device, session: bytes = SESSION) -> Device:
    device.send(m.Hello(1, 1))
    assert isinstance(device.next(), m.Welcome)
    device.send(m.Open(session=session, alias=1, epoch=1, model_id="aa"))
    assert isinstance(device.next(), m.Opened)
    return device


def test_a_cloud_that_computes_gives_signs_of_life_and_greets(part: HeldPart, device: Callable[[], Device]) -> None:
    first, second = opened(device()), opened(device(), b"s" * 16)
    first.send(rows(PROMPT, 5))
    assert part.inside.wait(WAIT_S)
    for number in range(1, 4):
        first.send(m.Ping(number))
        assert first.next() == m.Pong(number)
    third = device()
    third.send(m.Hello(1, 1))
    assert isinstance(third.next(), m.Welcome)
    third.send(m.Open(session=b"t" * 16, alias=1, epoch=1, model_id="aa"))
    second.send(rows(PROMPT, 5))
    second.send(m.Ping(7))
    assert second.next() == m.Pong(7), "and what is to be computed waits its turn"
    part.go.set()
    assert first.next().tokens == second.next().tokens == TEXT[:1]
    assert isinstance(third.next(), m.Opened)


def test_what_came_during_a_step_is_not_lost_nor_turned_around(part: HeldPart, device: Callable[[], Device]) -> None:
    one = opened(device())
    one.send(rows(PROMPT, 5))
    assert part.inside.wait(WAIT_S)
    many = 300  # more than are read at once
    for number in range(many):
        one.send(m.Open(session=SESSION, alias=2, epoch=number + 2, model_id="aa"))
    one.send(m.Ping(9))
    assert one.next() == m.Pong(9), "all before it were read during the step"
    part.go.set()
    answers = [one.next() for _ in range(many + 1)]
    assert [answer.epoch for answer in answers if isinstance(answer, m.Opened)] == list(range(2, many + 2))


def test_more_than_was_credited_is_refused_during_a_step_too(part: HeldPart, device: Callable[[], Device]) -> None:
    one = opened(device())
    one.send(rows(PROMPT, 5))
    assert part.inside.wait(WAIT_S)
    state = np.zeros((1, 64), np.float32)
    ahead = m.Fill(1, 1, 0, bytes(4), [0] * 500, tensors.encode(np.repeat(state, 500, 0), "f32"))
    for _ in range(8):
        one.send(ahead)
    answer = one.next()
    assert isinstance(answer, m.Fault)
    assert "credit" in answer.problem


def test_a_device_that_leaves_during_a_step_takes_nothing_with_it(part: HeldPart, device: Callable[[], Device]) -> None:
    stays, leaves = opened(device()), opened(device(), b"s" * 16)
    leaves.send(rows(PROMPT, 5))
    assert part.inside.wait(WAIT_S)
    leaves.wire.close()
    stays.send(m.Ping(1))
    assert stays.next() == m.Pong(1)
    part.go.set()
    stays.send(rows(PROMPT, 5))
    assert stays.next().tokens == TEXT[:1]


def test_links_stay_up_during_a_step_of_many_heartbeats(part: HeldPart, device: Callable[[], Device]) -> None:
    one = opened(device())
    with_heartbeats = LinkLimits(heartbeat_ms=30, silent_intervals=3)
    link = connect(one.wire.address, None, with_heartbeats)
    while not link.up:
        assert not isinstance(link.receive(20.0), m.Fault)
    one.send(rows(PROMPT, 5))
    assert part.inside.wait(WAIT_S)
    heard = []
    for _ in range(12):
        link.receive(50.0)
        heard.append(link.heard_s)
    up = link.up
    link.close()
    part.go.set()
    assert up
    assert len(set(heard)) >= 4, "pongs came while it computed"


def test_a_cloud_that_is_flooded_goes_on_computing(device: Callable[[], Device], part: HeldPart) -> None:
    part.go.set()
    one, flood = opened(device()), opened(device(), b"s" * 16)
    for number in range(2000):
        flood.wire.send(m.encode(m.Ping(number)))
    one.send(rows(PROMPT, 5))
    assert one.next().tokens == TEXT[:1]


def test_a_step_ends_however_much_there_is_to_attend_to() -> None:
    looks = 0

    def attend() -> bool:
        nonlocal looks
        looks += 1
        return True

    attendant = Attendant(attend, lambda timeout_s: None, short_s=1e-4)
    attendant.start()
    for _ in range(20):
        seen = looks
        with attendant:
            while looks < seen + 3:
                time.sleep(1e-4)
    attendant.close()


def test_what_fails_beside_a_step_does_not_end_it(caplog: pytest.LogCaptureFixture) -> None:
    tried = threading.Event()

    def attend() -> bool:
        tried.set()
        raise RuntimeError("a mistake")

    attendant = Attendant(attend, tried.wait, short_s=1e-4)
    with attendant:  # not started: nothing is lent
        assert not tried.wait(0.01)
    attendant.start()
    for _ in range(3):
        tried.clear()
        with attendant:
            assert tried.wait(WAIT_S)
    attendant.close()
    attendant.close()
    assert "a mistake" in caplog.text


@pytest.mark.parametrize("pause_s", [0.0, 3e-4, 0.01])
def test_it_ends_whenever_it_is_closed(pause_s: float) -> None:
    for _ in range(30):
        attendant = Attendant(lambda: False, lambda timeout_s: time.sleep(1e-4), short_s=1e-4)
        attendant.start()
        with attendant:
            time.sleep(pause_s / 3)
        time.sleep(pause_s)
        attendant.close()


def test_it_ends_when_a_step_was_broken_off_between_two_instructions() -> None:
    attendant = Attendant(lambda: True, lambda timeout_s: None, short_s=1e-4)
    attendant.start()
    attendant.__enter__()  # and a signal's exception came before the end of it was said
    time.sleep(0.002)
    attendant.close()


def test_nothing_is_looked_after_between_steps() -> None:
    """Whoever has the connections is alone with them."""
    inside = 0
    seen: list[bool] = []

    def attend() -> bool:
        seen.append(bool(inside))
        return False

    attendant = Attendant(attend, lambda timeout_s: time.sleep(1e-4), short_s=1e-4)
    attendant.start()
    while len(seen) < 100:
        inside = 1
        with attendant:
            time.sleep(1e-3)
        inside = 0
        time.sleep(1e-4)
    attendant.close()
    assert all(seen)
