"""When a cloud counts as silent: soon after what its link takes, however long it computes."""

from __future__ import annotations

import pytest

from isthmus.edge.trips import Trips

CLOUD_S = 0.008  # until a cloud that computes looks for pings, and some more


def trips(rtt_s: float, engine_s: float) -> Trips:
    found = Trips()
    for _ in range(3):
        found.answered(rtt_s + engine_s, engine_s)
    return found


def test_nothing_is_late_before_a_trip_was_seen() -> None:
    assert Trips().due_s() == 1.0
    assert Trips().ask_s(1.0) < 0.01, "and it is found out at once"


@pytest.mark.parametrize("engine_s", [0.008, 2.0])
@pytest.mark.parametrize(("rtt_s", "bound_s"), [(0.005, 0.05), (0.03, 0.06), (0.05, 0.1), (0.2, 0.4)])
def test_silence_is_heard_within_two_trips_however_long_the_cloud_computes(
    rtt_s: float, bound_s: float, engine_s: float
) -> None:
    found = trips(rtt_s, engine_s)
    due_s = found.due_s()
    assert 1.5 * rtt_s < due_s < bound_s
    back_s = found.ask_s(due_s) + 1.15 * rtt_s + CLOUD_S
    assert back_s < due_s, "a cloud that computes is heard in time, over a link that is somewhat slower than usual"


def test_it_is_not_asked_sooner_than_needed() -> None:
    near = trips(0.005, 0.0)
    assert near.ask_s(near.due_s()) > 0.01
    assert near.ask_s(1.0) == 0.5, "what waits longer leaves room for what is lost on the way"


def test_a_link_that_grows_longer_counts_at_once_and_one_that_grows_shorter_when_it_lasts() -> None:
    found = trips(0.05, 0.0)
    for _ in range(2):
        found.answered(0.2)
    assert found.due_s() > 0.3
    back = trips(0.2, 0.0)
    back.answered(0.05)
    assert back.due_s() > 0.3
    for _ in range(16):
        back.answered(0.05)
    assert back.due_s() < 0.1


def test_what_may_have_waited_counts_until_there_is_something_better() -> None:
    found = Trips()
    found.greeted(2.0)
    assert found.due_s() == pytest.approx(3.2)
    found.answered(0.05)
    found.greeted(2.0)
    assert found.due_s() < 0.1


def test_pings_queue_up_behind_what_was_sent() -> None:
    assert Trips.bulk_s(2_000) == 0.0
    assert Trips.bulk_s(14_096) == pytest.approx(0.8)
    assert Trips.bulk_s(1 << 30) == 4.0
