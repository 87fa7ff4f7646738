"""Forecasts of a budget in simulated time: what reads cost, what overlaps, and that bytes are those of the cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from isthmus.edge.experts.flash import LEAST_PIECE, MOST_PIECE, PIECE_MS, Flash, FlashSpeed
from isthmus.edge.experts.forecast import Forecast, Steps
from isthmus.edge.experts.simulate import simulate
from isthmus.engine.routing import Routing
from isthmus.protocol.errors import DeviceError

SIZE = 100_000
STEPS = Steps((1.0, 1.0, 1.0), (0.5, 0.5, 0.5), 2.0, 0.0, 0.0, (SIZE,) * 3, True, (False, True, True))
SPEED = FlashSpeed(100.0, 0.0)  # an expert a millisecond
ALL = 24 * SIZE


def routed(chosen: NDArray[np.int32], foreseen: NDArray[np.int32] | None = None) -> Routing:
    return Routing(chosen, np.ones(chosen.shape, np.float32), chosen if foreseen is None else foreseen)


def some(positions: int = 80, seed: int = 2) -> NDArray[np.int32]:
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.full(8, 0.6), 3)
    return np.array([[rng.choice(8, 2, replace=False, p=p) for p in weights] for _ in range(positions)], np.int32)


def turning() -> Routing:
    """Other experts with every token, so that with little memory each is missing."""
    return routed(np.array([[[2 * t % 8, (2 * t + 1) % 8]] * 3 for t in range(40)], np.int32))


def foretold(routing: Routing, budget: int, **settings: Any) -> Forecast:
    steps, speed = settings.pop("steps", STEPS), settings.pop("speed", SPEED)
    return Forecast.of(routing, 8, budget, steps, speed, **{"warm": 20, **settings})


def test_with_all_in_memory_a_token_takes_what_it_computes() -> None:
    found = foretold(routed(some()), ALL)
    assert found.token_ms == pytest.approx(8.0) == pytest.approx(STEPS.token_ms(2))
    assert found.exposed_ms == pytest.approx(0) and found.roofline_ms == pytest.approx(8.0)


def test_what_is_read_on_demand_adds_up() -> None:
    """Two experts a layer at 1 ms each, three layers: 6 ms, and what each wait costs."""
    found = foretold(turning(), 3 * SIZE, foresee=False)
    assert [found.token_ms, found.hit_rate, found.waits] == pytest.approx([14.0, 0.0, 3.0])
    assert found.read_mb == found.needed_mb == pytest.approx(0.6)
    waiting = foretold(turning(), 3 * SIZE, foresee=False, steps=replace(STEPS, wait_ms=0.25))
    assert waiting.token_ms == pytest.approx(14.75)
    assert waiting.roofline_ms == pytest.approx(8.0)


def test_reading_ahead_overlaps_with_computing() -> None:
    """While a layer computes for 2 ms both experts of the next one come, but none of the first layer's."""
    found = foretold(turning(), 10 * SIZE)
    assert found.token_ms == pytest.approx(10.0, abs=0.01) and found.waits == pytest.approx(1.0)
    costly = foretold(turning(), 10 * SIZE, steps=replace(STEPS, read_ms=0.1))
    assert costly.token_ms > found.token_ms and costly.meanwhile >= 3


def test_wrong_guesses_are_read_in_vain_and_given_up() -> None:
    chosen = turning().chosen
    found = foretold(routed(chosen, (chosen + 2) % 8), 10 * SIZE, warm=0)
    assert 0 < found.read_mb - found.needed_mb < 0.3
    assert found.token_ms == pytest.approx(14.0, abs=1.0)


def test_large_experts_are_computed_as_they_arrive() -> None:
    """The first of two is computed while the second one comes, where they are not computed together."""
    together, each = (
        foretold(turning(), 3 * SIZE, foresee=False, steps=replace(STEPS, small=small)) for small in (True, False)
    )
    assert each.token_ms == pytest.approx(together.token_ms - 3 * 0.5)


@pytest.mark.parametrize("policy", ["lru", "lfru", "belady"])
@pytest.mark.parametrize("room", [3, 9, 15])
def test_without_reading_ahead_hits_are_those_of_the_cache(policy: str, room: int) -> None:
    routing = routed(some())
    found = foretold(routing, room * SIZE, foresee=False, policy=policy, warm=0)
    assert found.hit_rate == pytest.approx(simulate(routing, 8, room, policy).hit_rate())
    assert found.read_mb == pytest.approx((1 - found.hit_rate) * 6 * SIZE / 1e6)


def test_slower_flash_makes_slower_tokens() -> None:
    took = [foretold(routed(some()), 6 * SIZE, speed=FlashSpeed(100.0, 0.1, limit)).token_ms for limit in (20, 60, 500)]
    assert took == sorted(took, reverse=True) and took[0] > took[2]


def test_a_budget_that_is_too_small_is_refused() -> None:
    with pytest.raises(DeviceError, match=r"a capacity of 2 experts.*at least the 3"):
        foretold(routed(some()), 2 * SIZE)


def test_reads_share_the_bandwidth_and_urgent_ones_go_first() -> None:
    flash = Flash(FlashSpeed(100.0, 0.5))
    for cell in range(4):
        flash.ask(cell, SIZE, 0.0, urgent=False)
    flash.advance(0.0)
    flash.ask(7, SIZE, 0.1, urgent=True)
    assert flash.arrival(7) == pytest.approx((LEAST_PIECE + SIZE) / 1e5 + 0.5)  # behind the piece that has begun
    assert flash.arrival(0) == pytest.approx(2 * SIZE / 1e5 + 0.5)
    assert flash.withdraw() == [(3, False), (2, False), (1, False)] and flash.dropped == 0
    with pytest.raises(AssertionError, match="nobody asked"):
        flash.arrival(3)


def test_a_long_read_ahead_makes_way_between_its_pieces() -> None:
    """What was begun goes on before what is urgent if it is wanted, and is dropped otherwise."""
    piece = MOST_PIECE
    for wanted, there in (([0], 5.5), ([], None)):
        flash = Flash(FlashSpeed(piece / 1e3 / PIECE_MS, 0.0))
        flash.ask(0, 10 * piece, 0.0, urgent=False)
        flash.ask(2, 10 * piece, 0.0, urgent=False)
        flash.advance(1.2)
        flash.ask(1, piece, 1.2, urgent=True)
        assert flash.arrival(1) == pytest.approx(2.0)  # three pieces of half a millisecond were begun
        dropped = dict(flash.withdraw(wanted))
        assert dropped == {2: False} if there else {2: False, 0: True}
        if there:
            assert flash.arrival(0) == pytest.approx(there) and flash.bytes == 11 * piece
        assert flash.dropped == (0 if there else 3 * piece)


def test_reads_ahead_that_are_in_hand_are_dropped_at_once() -> None:
    flash = Flash(FlashSpeed(MOST_PIECE / 1e3 / PIECE_MS, 0.0))
    flash.ask(0, 10 * MOST_PIECE, 0.0, urgent=False)
    flash.advance(0.0)
    assert flash.withdraw([5]) == [(0, True)] and flash.dropped == MOST_PIECE
    flash.ask(3, MOST_PIECE, 0.1, urgent=False)
    assert flash.arrival(3) == pytest.approx(1.0)


def test_an_emulated_flash_is_never_faster_than_the_real_one() -> None:
    for limit, least in ((50.0, 2.0), (1e6, 1.5)):
        flash = Flash(FlashSpeed(100.0, 0.5, limit))
        flash.ask(0, SIZE, 0.0, urgent=True)
        assert flash.arrival(0) == pytest.approx(least)
