"""The silence of one wait: asked in time, dark only after a ping could have come back, and trips learnt from pings."""

from __future__ import annotations

import pytest

from isthmus.edge.quiet import Quiet
from isthmus.edge.trips import Trips


class Connection:
    def __init__(self) -> None:
        self.heard_s = 0.0
        self.asked_s: float | None = None
        self.probed: tuple[float, float] | None = None
        self.probes: list[float] = []
        self.now = 0.0

    def probe(self) -> None:
        self.probes.append(self.now)
        self.asked_s = self.now

    def heard(self, at: float, pong: bool = True) -> None:
        self.heard_s, self.asked_s = at, None
        if pong:
            self.probed = (self.probes[-1], at)


def quiet(wire: Connection, rtt_s: float, hush_s: float | None = None, sent: int = 0) -> tuple[Quiet, Trips]:
    trips = Trips()
    trips.answered(rtt_s)
    return Quiet(wire, trips, trips.due_s if hush_s is None else lambda: hush_s, lambda: sent, wire.now), trips


def pinged(one: Quiet, wire: Connection) -> float:
    """When it next had something to do, and did."""
    wire.now = one.wake_s()
    one.ask(wire.now)
    return wire.now


@pytest.mark.parametrize("rtt_s", [0.001, 0.02, 0.05, 0.2])
def test_a_dark_link_is_asked_once_and_called_dark_when_it_is_due(rtt_s: float) -> None:
    wire = Connection()
    one, trips = quiet(wire, rtt_s)
    while not one.dark(wire.now):
        one.hear(0.0, wire.now)
        pinged(one, wire)
        assert wire.now < 1.0
    assert len(wire.probes) == 1
    assert wire.now == pytest.approx(trips.due_s())


def test_a_device_that_was_busy_asks_before_it_judges() -> None:
    wire = Connection()
    one, _ = quiet(wire, 0.02)
    wire.now = 0.5  # a pass of its own took so long
    assert not one.dark(wire.now)
    one.ask(wire.now)
    assert wire.probes == [0.5]
    assert one.dark_s() - 0.5 > 1.3 * 0.02
    wire.now = 0.522
    wire.heard(0.52)
    one.hear(0.0, 0.5)
    assert not one.dark(0.53)


def test_a_ping_that_is_under_way_already_counts() -> None:
    wire = Connection()
    wire.asked_s, wire.now = 1.0, 1.01
    one, trips = quiet(wire, 0.02)
    assert one.dark_s() == pytest.approx(1.0 + trips.due_s())
    one.ask(1.02)
    assert wire.probes == []


def test_trips_are_learnt_from_pongs_that_were_waited_for() -> None:
    wire = Connection()
    one, trips = quiet(wire, 0.02)
    before = trips.due_s()
    for turn in range(3):
        pinged(one, wire)
        wire.heard(wire.now + 0.1)
        one.hear(0.0, wire.now + 0.05 * turn)
    assert trips.due_s() > 2 * before


@pytest.mark.parametrize(("began_s", "pong"), [(0.1, True), (0.0, False)])
def test_what_lay_here_or_is_no_pong_tells_nothing_of_trips(began_s: float, pong: bool) -> None:
    wire = Connection()
    one, trips = quiet(wire, 0.02)
    for _ in range(3):
        pinged(one, wire)
        wire.heard(0.1, pong)
        one.hear(0.0, began_s)
    assert trips.due_s() == pytest.approx(0.034)


def test_a_ping_that_an_answer_overtook_is_not_taken_for_the_next_one() -> None:
    wire = Connection()
    one, trips = quiet(wire, 0.2)
    before = trips.due_s()
    for _ in range(20):
        pinged(one, wire)
        wire.heard(wire.now + 0.001, pong=False)
        one.hear(0.0, wire.now)
    assert trips.due_s() == before


def test_a_link_that_became_slower_is_learnt_though_its_pongs_come_too_late() -> None:
    wire = Connection()
    one, trips = quiet(wire, 0.005)
    for _ in range(8):
        asked_s = pinged(one, wire)
        wire.heard(asked_s + 0.06)
        one.hear(asked_s + 0.055, asked_s + 0.07)  # it lay here when a pass was over
        wire.now = asked_s + 0.1
    assert trips.due_s() == pytest.approx(1.6 * 0.055)


def test_where_it_is_known_to_be_dark_nobody_waits() -> None:
    wire = Connection()
    one, _ = quiet(wire, 0.02, hush_s=0.0)
    assert one.known
    assert one.dark(wire.now)


def test_a_large_upload_gets_its_time() -> None:
    wire = Connection()
    small, large = quiet(wire, 0.02)[0], quiet(wire, 0.02, sent=500_000)[0]
    assert large.dark_s() - small.dark_s() == pytest.approx(4.0)
