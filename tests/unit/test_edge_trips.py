"""When a cloud counts as silent: soon after what its link takes, and never before its own steps can be done."""

from __future__ import annotations

import pytest

from isthmus.edge.trips import Trips
from isthmus.protocol.messages import Offer

FAST = ((1, 8_000), (4, 12_000), (8, 20_000))


def trips(rtt_s: float, steps: tuple[tuple[int, int], ...] = FAST, row_us: int = 2_000) -> Trips:
    found = Trips()
    found.declared(Offer("m" * 64, "toy", 30, 576, 49152, "n", True, (), (), 2048, steps=steps, row_us=row_us))
    for _ in range(3):
        found.answered(rtt_s + 0.008, 0.008, 1)
    return found


def test_nothing_is_late_before_a_trip_was_seen() -> None:
    assert Trips().due_s(0) == 1.0


@pytest.mark.parametrize(("rtt_s", "bound_s"), [(0.005, 0.05), (0.05, 0.1), (0.2, 0.4)])
def test_a_stream_that_stops_is_heard_within_two_trips(rtt_s: float, bound_s: float) -> None:
    found = trips(rtt_s)
    for _ in range(9):
        found.streamed(0.008)
    assert 1.5 * rtt_s < found.due_s(0) < bound_s


def test_an_answer_to_a_block_is_missed_within_two_trips_as_well() -> None:
    assert 0.05 + 0.01 < trips(0.05).due_s(4) < 0.1


def test_a_cloud_of_long_steps_gets_their_time() -> None:
    slow = trips(0.005, tuple((rows, 10 * us) for rows, us in FAST), 20_000)
    assert slow.due_s(0) > 2 * 0.08
    assert slow.due_s(4) > 0.12 + 0.005
    assert slow.due_s(100) > 0.2 + 92 * 0.02
    assert slow.due_s(500) < 5.0  # it computes them in chunks, and answers pings between
    for _ in range(9):
        slow.streamed(0.0)  # a burst after a stall
    assert slow.due_s(0) > 2 * 0.08


def test_a_cloud_that_takes_longer_than_it_says_gets_that() -> None:
    found = trips(0.05)
    assert found.due_s(8) < 0.1
    for _ in range(20):
        found.answered(0.05 + 0.06, 0.06, 8)
    assert found.due_s(8) == pytest.approx(1.05 * 0.05 + 1.15 * 0.06)


def test_a_cloud_that_says_nothing_of_its_steps() -> None:
    found = Trips()
    found.answered(0.05)
    assert found.due_s(0) < 0.1 < found.due_s(20) < 1.0
