"""A part that pretends to be slower: the same results, and a wait in proportion to what it computed."""

from __future__ import annotations

import math

import pytest

from isthmus.engine.part import Rows, Want
from isthmus.engine.slow import MOST, SlowPart, check_slow_down, slowed
from isthmus.protocol.errors import EngineError
from tests.toy_part import N_LAYERS, ToyPart


class Clock:
    """Goes on by so much with each look; sleeps are written down."""

    def __init__(self, step_s: float) -> None:
        self.step_s, self.now_s, self.slept = step_s, 0.0, list[float]()

    def __call__(self) -> float:
        self.now_s += self.step_s
        return self.now_s


def test_a_slowed_part_gives_the_same_and_waits_in_proportion() -> None:
    clock = Clock(0.5)
    slow, plain = SlowPart(ToyPart(), 4.0, clock, clock.slept.append), ToyPart()
    one, two = slow.open(), plain.open()
    for start in (0, 3):
        rows = (Rows().tokens(s, start, [5, 6, 7], want=Want.SAMPLE, want_all=True) for s in (one, two))
        a, b = slow.step(next(rows)), plain.step(next(rows))
        assert a.tokens == b.tokens
    assert clock.slept == [1.5, 1.5]
    assert slow.end == N_LAYERS and slow.config is slow._part.config


def test_a_step_that_fails_is_not_waited_for() -> None:
    clock = Clock(0.5)
    slow = SlowPart(ToyPart(max_tokens=2), 4.0, clock, clock.slept.append)
    with pytest.raises(EngineError):
        slow.step(Rows().tokens(slow.open(), 0, [1, 2, 3]))
    assert clock.slept == []


def test_a_factor_of_one_leaves_the_part_alone() -> None:
    part = ToyPart()
    assert slowed(part, 1.0) is part
    assert isinstance(slowed(part, 1.5), SlowPart)


@pytest.mark.parametrize("factor", [0.0, 0.99, -1.0, MOST + 1, math.inf, math.nan])
def test_what_is_no_factor_is_refused(factor: float) -> None:
    with pytest.raises(EngineError, match=f"the slow-down is {factor:g}"):
        check_slow_down(factor)
