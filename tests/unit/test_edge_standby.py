"""What a device does while it waits."""

from __future__ import annotations

import math
from typing import Any

import pytest

from isthmus.edge.standby import LEAST, LOOK_S, MOST, Standby
from isthmus.engine.sampling import GREEDY
from isthmus.protocol.chain import Chain
from isthmus.protocol.errors import DeviceError

AGES = 1e9


class Part:
    """Counts what is asked of it."""

    def __init__(self) -> None:
        self.kv, self.sampled, self.passes = 0, -1, list[int]()
        self.stuck = False  # nothing more can be computed without taking from others

    def held(self, log: Chain) -> int:
        return self.kv

    def remembers(self, log: Chain, sampling: Any) -> bool:
        return self.sampled == len(log)

    def advance(self, log: Chain, rows: int, anew: bool) -> bool:
        if self.stuck and not anew:
            return False
        self.passes.append(rows)
        self.kv += rows
        return True

    def sample(self, log: Chain, sampling: Any) -> int:
        self.kv = self.sampled = len(log)
        return 7


class Holding:
    """Weights that are looked over when told so."""

    def __init__(self) -> None:
        self.part, self.checked, self.opened = Part(), True, 0
        self.fails: Exception | None = None

    def prefetch(self) -> Any:
        return lambda: self.checked

    def open(self) -> Part:
        self.opened += 1
        if self.fails is not None:
            raise self.fails
        return self.part


def log_of(tokens: int) -> Chain:
    log = Chain()
    log.extend(range(tokens))
    return log


def ready(tokens: int, early: bool = True) -> tuple[Standby, Holding, Chain]:
    holding, log = Holding(), log_of(tokens)
    return Standby(holding.open, holding.prefetch, log, early), holding, log


def test_it_catches_up_in_passes_that_end_soon() -> None:
    standby, holding, _ = ready(2 * MOST + 6)
    while standby.work(GREEDY, False, False, AGES) == 0.0:
        pass
    assert holding.part.passes == [MOST, MOST, 5]


def test_a_few_tokens_are_not_worth_a_pass_until_the_device_is_about_to_go_on_alone() -> None:
    standby, holding, log = ready(40)
    while standby.work(GREEDY, False, False, AGES) == 0.0:
        pass
    log.extend((1, 2))
    rest_s = standby.work(GREEDY, False, False, 0.5)
    assert 0.0 < rest_s < 0.5 and holding.part.sampled == 40  # once, to know what it takes
    assert standby.work(GREEDY, False, False, 0.0) == 0.0 and holding.part.sampled == 42
    assert standby.work(GREEDY, False, False, 0.0) == math.inf


def test_what_a_cut_left_is_filled_before_the_first_token_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    standby, holding, log = ready(40)
    for name, took_s in (("advance", 0.01), ("sample", 0.02)):
        takes = getattr(holding.part, name)

        def slowly(*given: Any, takes: Any = takes, took_s: float = took_s) -> Any:
            now[0] += took_s
            return takes(*given)

        monkeypatch.setattr(holding.part, name, slowly)
    while standby.work(GREEDY, False, False, AGES) == 0.0:
        pass
    log.extend((1, 2, 3))
    assert standby.work(GREEDY, False, False, 0.2) == pytest.approx(0.2 - 1.5 * (0.01 + 0.02))
    assert standby.work(GREEDY, False, False, 0.04) == 0.0 and holding.part.passes[-1] == 2
    assert standby.work(GREEDY, False, False, 0.03) == 0.0 and holding.part.sampled == 43


def test_a_device_that_is_far_behind_catches_up_before_it_guesses() -> None:
    standby, holding, _ = ready(200)
    assert standby.work(GREEDY, False, False, -1.0) == 0.0
    assert holding.part.sampled < 0 and holding.part.passes == [MOST]


def test_what_cannot_be_caught_up_is_left() -> None:
    standby, holding, log = ready(40)
    holding.part.stuck = True
    for left_s in (AGES, 0.0):
        assert standby.work(GREEDY, False, False, left_s) == math.inf
    holding.part.kv = len(log) - 1 - LEAST
    assert standby.work(GREEDY, False, False, 0.5) == 0.5 and holding.part.sampled < 0
    assert standby.work(GREEDY, False, False, 0.0) == 0.0 and holding.part.sampled == len(log)


def test_weights_are_looked_over_first_and_nothing_is_opened_meanwhile() -> None:
    standby, holding, _ = ready(40)
    holding.checked = False
    assert standby.work(GREEDY, False, False, AGES) == LOOK_S and not holding.opened
    holding.checked = True
    assert standby.work(GREEDY, False, False, AGES) == 0.0


@pytest.mark.parametrize(("early", "begins"), [(True, True), (False, False), (False, True)])
def test_a_device_that_is_to_leave_the_cloud_alone_begins_when_it_is_silent(early: bool, begins: bool) -> None:
    standby, holding, _ = ready(MOST, early)
    assert standby.work(GREEDY, begins, False, 0.3) == 0.3 and not holding.opened
    while standby.work(GREEDY, begins, False, -0.1) == 0.0:
        pass
    assert holding.part.sampled == MOST


@pytest.mark.parametrize("when", ["opening", "filling"])
def test_a_device_that_cannot_be_ready_leaves_it(when: str) -> None:
    standby, holding, _ = ready(40)
    if when == "filling":
        standby.work(GREEDY, False, False, AGES)
    holding.fails = DeviceError("no room", "take less")
    assert standby.work(GREEDY, False, False, AGES) == math.inf
    opened = holding.opened
    assert standby.work(GREEDY, False, False, AGES) == math.inf and holding.opened == opened
