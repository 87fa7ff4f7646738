"""Auto beside this device's own experts and layers: how long they are waited for, and what comes when they fail."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from isthmus.edge import knowledge as knowing
from isthmus.edge import priors, profile
from isthmus.edge.experts.stalls import Mixture, Stalls
from isthmus.edge.figures import Wish
from isthmus.edge.stopwatch import Stopwatch
from isthmus.engine.part import Rows, StepResult
from isthmus.protocol.errors import BundleError
from tests.edge_decider import SLOW, TimedCloud, TimedPart, decider, undisturbed
from tests.edge_toys import PROMPT, ids, toy_engine  # noqa: F401
from tests.edge_world import LossyWire
from tests.stored_experts import full_store
from tests.toy_part import N_LAYERS

QUARTER = 2000 * N_LAYERS  # bytes of the experts of `waiting`


class WaitingPart(TimedPart):
    """A toy whose steps wait for experts as well."""

    def __init__(self, end: int, wire: LossyWire, wait_ms: list[float]) -> None:
        super().__init__(end, wire, row_ms=10.0)
        self.waited, self._wait_ms = 0.0, wait_ms

    def step(self, rows: Rows) -> StepResult:
        self.waited += self._wait_ms[0] * 1e-3
        self._wire.now += self._wait_ms[0] * 1e-3
        return super().step(rows)


def waiting(patch: pytest.MonkeyPatch, wire: LossyWire, wait_ms: list[float], *, known: bool, **options: Any) -> Any:
    """A device that waits for experts, in auto; without `known` nothing was measured of it."""
    mixture, was = Mixture([1000] * N_LAYERS, N_LAYERS, 8, 2), priors.watch
    one = Stalls(mixture, QUARTER, wire.clock, mb_s=1000.0 if known else 0.0, token_ms=wait_ms[0])
    one.store = full_store(QUARTER)
    patch.setattr(priors, "watch", lambda *given: Stopwatch(was(*given).sizes, wire.clock, one))
    patch.setattr(knowing, "TRY_STEPS", 50)  # to be seen
    return decider(patch, wire, known=known, part=lambda end: WaitingPart(end, wire, wait_ms), **options)


@pytest.mark.parametrize(("wait_ms", "sources"), [(5.0, {"device"}), (90.0, {"cloud"})])
def test_own_experts_answer_where_a_round_trip_takes_longer(
    monkeypatch: pytest.MonkeyPatch, wait_ms: float, sources: set[str]
) -> None:
    told: list[str] = []
    wire = LossyWire(TimedCloud(), delay_s=(0.02, 0.021))
    with waiting(monkeypatch, wire, [wait_ms], known=True, explain=told.append) as one:
        one._steering._controller._wish = Wish(own=True)
        text = ids(one.generate(PROMPT, max_tokens=40))
        assert set(one.stats.sources) == sources
    assert f"a token waits {wait_ms:.1f} ms for experts here" in told[0] and "and a round trip takes 4" in told[0]
    monkeypatch.undo()
    assert text == undisturbed(max_tokens=40)


def test_a_cloud_is_asked_once_experts_are_waited_for_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    wire, wait_ms = LossyWire(TimedCloud(), delay_s=(0.02, 0.021)), [5.0]
    with waiting(monkeypatch, wire, wait_ms, known=True) as one:
        one._steering._controller._wish = Wish(own=True)
        answer = one.generate(PROMPT, max_tokens=60)
        text = [next(answer).id for _ in range(20)]
        wait_ms[0] = 300.0
        text += ids(answer)
        assert set(one.stats.sources[:20]) == {"device"} and one.stats.sources[-1] == "cloud"
    monkeypatch.undo()
    assert text == undisturbed(max_tokens=60)


def test_a_device_that_waits_for_experts_is_tried_for_no_longer_than_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = LossyWire(TimedCloud(SLOW))
    with waiting(monkeypatch, wire, [20.0], known=False) as one:
        ids(one.generate(PROMPT, max_tokens=20))
        knowledge = one._steering._controller._knowledge
        assert knowledge._watch.knows
        assert knowledge._watch.ms_per_mb * knowledge._watch.sizes.of(N_LAYERS, True) / 1e6 == pytest.approx(10.0)
        device = knowledge.figures(wire.now).device
        assert device.waits.token_ms == pytest.approx(20.0) and device.token_ms == pytest.approx(30.0)
        assert one.stats.sources[-1] == "device"  # 30 ms a token, and the cloud takes 80


def test_a_device_that_waits_for_very_long_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = LossyWire(TimedCloud())
    with waiting(monkeypatch, wire, [2000.0], known=False) as one:
        before = wire.now
        ids(one.generate(PROMPT, max_tokens=20))
        assert one._holding.part.part.waited == pytest.approx(2.0) and wire.now - before < 4.0
        knowledge = one._steering._controller._knowledge
        assert knowledge._watch.knows and knowledge.enough
        assert set(one.stats.sources) == {"cloud"}


def test_what_flash_reads_is_kept_for_the_next_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("profiles")
    monkeypatch.setattr(profile, "folder", lambda: folder)
    for known, first in ((False, "cloud"), (True, "device")):  # as a device that reads fast, and then one that has
        with waiting(monkeypatch, LossyWire(TimedCloud(SLOW)), [2.0], known=False) as one:
            stalls = one._steering._controller._knowledge._watch.stalls
            assert bool(stalls.mb_s) == known
            ids(one.generate(PROMPT, max_tokens=20))
            assert one.stats.sources[0] == first
            stalls.remember(250.0)
            one._steering._controller._knowledge.keep()
    (path,) = folder.iterdir()
    found = profile.read(path)
    assert found is not None and found.flash_mb_s == 250.0
    assert found.near(found) and not found.near(dataclasses.replace(found, flash_mb_s=300.0))
    path.write_text('{"ms_per_mb": 1, "row_ms": 0, "numerics": "toy"}')
    assert profile.read(path) == profile.Profile(1.0, 0.0, "toy")
    path.write_text('{"ms_per_mb": 1, "row_ms": 0, "numerics": "toy", "flash_mb_s": -1}')
    assert profile.read(path) is None


class FailingPart(TimedPart):
    """A toy that is damaged: its steps fail after so many."""

    def __init__(self, end: int, wire: LossyWire, steps: int) -> None:
        super().__init__(end, wire, row_ms=10.0)
        self.left = steps

    def step(self, rows: Rows) -> StepResult:
        self.left -= 1
        if self.left < 0:
            raise BundleError("expert 3 of layer 2 was altered or is damaged", "fetch it again")
        return super().step(rows)


@pytest.mark.parametrize("steps", [0, 7])
def test_a_device_whose_layers_fail_asks_the_cloud_from_then_on(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    told: list[str] = []
    wire, opened = LossyWire(TimedCloud(SLOW)), list[int]()

    def part(end: int) -> FailingPart:
        opened.append(end)
        return FailingPart(end, wire, steps)

    with decider(monkeypatch, wire, known=True, part=part, explain=told.append) as one:
        text = ids(one.generate(PROMPT, max_tokens=40))
        assert set(one.stats.sources) == ({"device", "cloud"} if steps else {"cloud"})
        assert one.stats.note.count("was altered or is damaged") == 1
        assert any("stream: local failed" in why for why in told)
        assert one.stats.sources.count("device") < 8 and len(opened) == 1
        ids(one.generate(PROMPT, max_tokens=40))
        assert set(one.stats.sources) == {"cloud"} and not one.stats.note and len(opened) == 1
        assert "(expert 3 of layer 2 was altered or is damaged)" in told[-1]
    monkeypatch.undo()
    assert text == undisturbed(max_tokens=40)


def test_a_device_whose_layers_fail_without_a_cloud_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = LossyWire(TimedCloud(SLOW))
    with decider(monkeypatch, wire, known=True, part=lambda end: FailingPart(end, wire, 12)) as one:
        answer = one.generate(PROMPT, max_tokens=40)
        for _ in range(4):
            next(answer)
        wire.cloud = None
        with pytest.raises(BundleError, match="was altered or is damaged"):
            list(answer)


def test_a_device_that_fails_when_it_is_tried_is_no_more_thought_of(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = LossyWire(TimedCloud(SLOW))
    with decider(monkeypatch, wire, part=lambda end: FailingPart(end, wire, 1)) as one:
        assert len(ids(one.generate(PROMPT, max_tokens=30))) == 30
        knowledge = one._steering._controller._knowledge
        assert knowledge.failed and knowledge.enough and not knowledge.figures(wire.now).device.whole
        assert one.stats.note.count("this device cannot compute by itself (expert 3 of layer 2 was altered") == 1
        ids(one.generate(PROMPT, max_tokens=30))
        assert set(one.stats.sources) == {"cloud"}


def test_a_device_that_is_busy_by_itself_knows_how_long_a_trip_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = LossyWire(TimedCloud(SLOW), delay_s=(0.01, 0.01))
    with decider(monkeypatch, wire, known=True) as one:
        ids(one.generate(PROMPT, max_tokens=400))
        assert set(one.stats.sources) == {"device"} and wire.rtt is not None
        link = one._steering._controller._knowledge.figures(wire.now).link
        assert 15 < link.trip_ms < 25 and link.trip_high_ms < 30
