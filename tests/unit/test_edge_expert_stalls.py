"""How long steps will wait for experts: foretold before anything was read, and corrected by what was waited."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import pytest

from isthmus.edge import Device, ExpertSettings, priors
from isthmus.edge.costs import Standing
from isthmus.edge.experts.facts import Facts, write_facts, write_routing
from isthmus.edge.experts.foretold import foretell
from isthmus.edge.experts.stalls import BOUND, EXPOSED, HALF_S, HOPED, SPREAD, Mixture, Stalls
from isthmus.edge.figures import CloudFigures, DeviceFigures, Figures, LinkFigures, Waits, Wish
from isthmus.edge.holding import Holding
from isthmus.edge.local import CHUNK
from isthmus.edge.options import as_wish
from isthmus.edge.policy import MARGIN, Plan, decide, explain
from isthmus.edge.stopwatch import ENOUGH, Sizes, Stopwatch
from isthmus.engine.config import ExpertsConfig
from isthmus.engine.part import Part, Rows, Want, waited
from isthmus.engine.slow import slowed
from isthmus.protocol.errors import DeviceError
from isthmus.split.bundle import Bundle
from isthmus.split.manifest import expert_file
from tests.native_tools import open_part
from tests.random_model import RandomModel, random_config
from tests.stored_experts import full_store, paged, record, record_bytes, stored

EACH, LAYERS, EXPERTS, TAKEN = 1_000_000, 10, 64, 8  # an expert is read in 1 ms at 1,000 MB/s
WHOLE = EACH * LAYERS * EXPERTS


MIXTURE = Mixture([EACH] * LAYERS, LAYERS, EXPERTS, TAKEN)


def still() -> float:
    return 0.0


def stalls(
    share: float = 0.25, clock: Callable[[], float] = still, held: float | None = None, **known: float
) -> Stalls:
    """With so much of the experts in memory: as much as there may be, or a share of all."""
    one = Stalls(MIXTURE, int(share * WHOLE), clock, **known)
    one.store = full_store(int(min(1.0, share if held is None else held) * WHOLE))
    return one


def full(one: Stalls, resident: int) -> Stalls:
    """With so many bytes in memory."""
    one.store = full_store(resident)
    return one


def of(bundle: Bundle, settings: ExpertSettings) -> Stalls:
    found = Stalls.of(bundle, settings, 1, still)
    assert found is not None
    return found


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setattr("isthmus.edge.profile.folder", lambda: tmp_path / "kept")
    return stored(RandomModel("n8", random_config(experts=ExpertsConfig(8, 2, 40))), tmp_path / "bundle")


def test_a_token_of_which_nothing_is_known_waits_for_what_memory_probably_lacks() -> None:
    assert stalls(1 / 8).token_ms() == pytest.approx(HOPED * LAYERS * TAKEN * (1 - 0.5))
    assert stalls(1 / 8, limit_mb_s=100).token_ms() == pytest.approx(HOPED * 10 * LAYERS * TAKEN * (1 - 0.5))
    assert stalls(1 / 8, mb_s=500, limit_mb_s=2000).token_ms() == pytest.approx(HOPED * 2 * LAYERS * TAKEN * (1 - 0.5))
    assert stalls(1.0).token_ms() == stalls(3.0).token_ms() == 0.0
    assert stalls(0.25, token_ms=7.0).token_ms() == pytest.approx(7.0)  # recorded


def test_what_fills_the_memory_is_read_once() -> None:
    whole = stalls(1.0, held=0.0)
    assert whole.token_ms() == pytest.approx(HOPED * LAYERS * EXPERTS / SPREAD)
    assert stalls(0.25, held=0.05).token_ms() > stalls(0.25, held=0.2).token_ms() > stalls(0.25).token_ms()
    tiny = stalls(9 / 640, held=0.0)
    assert tiny.token_ms() < LAYERS * TAKEN  # no token reads more than it takes
    cold, full = stalls(0.5, held=0.0), stalls(0.5)
    for _ in range(20):
        cold.saw(1, 1.0, 70.0, 0.0)
        full.saw(1, 1.0, 70.0, 0.0)
    cold.store = full_store(WHOLE // 2)
    assert cold.token_ms() < 20 < 50 < full.token_ms()  # 80 were foretold while the memory was empty


def test_a_device_that_was_not_used_hopes_and_one_that_was_knows() -> None:
    one, foretold = stalls(1 / 8), LAYERS * TAKEN / 2
    assert one.token_ms() == pytest.approx(HOPED * foretold)
    for _ in range(20):
        one.saw(1, 1.0, foretold, 0.0)
    assert one.token_ms() == pytest.approx(foretold)
    cold = stalls(1 / 8, held=0.01)
    for _ in range(20):
        cold.saw(1, 1.0, foretold, 0.0)
    cold.store = full_store(WHOLE // 8)
    assert cold.token_ms() < HOPED * foretold


def test_half_of_the_layers_wait_half_as_long_and_tell_of_all() -> None:
    here = Stalls(MIXTURE._replace(sizes=[EACH] * (LAYERS // 2)), int(0.25 * WHOLE / 2), still)
    here.store = full_store(int(0.25 * WHOLE / 2))
    assert here.token_ms() == pytest.approx(stalls(0.25).token_ms())
    here.saw(1, 0.5, 30.0, 0.0)
    there = stalls(0.25)
    there.saw(1, 1.0, 60.0, 0.0)
    assert here.token_ms() == pytest.approx(there.token_ms())
    assert Stalls(Mixture([], 0, EXPERTS, TAKEN), 1, still).token_ms() == 0.0


def test_tokens_that_waited_count_more_than_what_was_foretold_and_later_ones_more_than_earlier() -> None:
    one = stalls(token_ms=100.0)
    told = [one.token_ms()]
    for _ in range(100):
        one.saw(1, 1.0, 10.0, 0.0)
        told.append(one.token_ms())
    assert told == sorted(told, reverse=True) and told[-1] < 30
    for _ in range(20):
        one.saw(1, 1.0, 200.0, 0.0)
    assert one.token_ms() > 100


def test_a_prompt_waits_for_each_expert_once_a_chunk_and_not_for_what_is_computed_meanwhile() -> None:
    told = dict(stalls(held=0.0).prompt_ms(0.0))
    assert told[1] == pytest.approx(LAYERS * TAKEN)
    assert sorted(told.values()) == list(told.values()) and told[CHUNK] == pytest.approx(LAYERS * EXPERTS, rel=1e-3)
    assert dict(stalls(held=0.0).prompt_ms(2.0))[CHUNK] == pytest.approx(told[CHUNK] - 2.0 * CHUNK)
    assert dict(stalls(held=0.0).prompt_ms(1e3)) == pytest.approx({rows: EXPOSED * ms for rows, ms in told.items()})


def test_prompts_that_waited_otherwise_correct_the_next_ones_within_bounds() -> None:
    for waited_ms, at_most in ((0.0, 0.2), (1e9, BOUND)):
        one = stalls()
        before = dict(one.prompt_ms(0.0))[64]
        one.saw(64, 1.0, waited_ms, 0.0)
        first = dict(one.prompt_ms(0.0))[64]
        assert (first < before) == (waited_ms < before)
        for _ in range(30):
            one.saw(64, 1.0, waited_ms, 0.0)
        assert dict(one.prompt_ms(0.0))[64] == pytest.approx(before * min(max(at_most, 1 / BOUND), BOUND), rel=0.7)


def test_waits_of_long_prompts_go_in_chunks() -> None:
    waits = Waits(3.0, ((1, 10.0), (128, 100.0)))
    assert waits.prompt(0) == Waits().prompt(50) == 0.0
    assert waits.prompt(1) == 10 and waits.prompt(128) == 100 and waits.prompt(256) == 200
    assert waits.prompt(129) == 110 and 10 < waits.prompt(64) < 100


def test_what_is_in_memory_shortens_a_prompt_and_reads_tell_how_fast_flash_is(bundle: Bundle) -> None:
    settings = ExpertSettings(24 * record_bytes(bundle) / 1e6)
    told = of(bundle, settings)
    cold = dict(told.prompt_ms(0.0))[CHUNK]
    with paged(bundle, settings.budget) as (part, store):
        told.store = store
        assert dict(told.prompt_ms(0.0))[CHUNK] == cold
        part.replay(record([[e, e + 1] for e in range(0, 8, 2)]))
        sequence = part.open()
        for at in range(4):
            part.step(Rows().tokens(sequence, at, [at], want=Want.NONE))
        assert store.report().resident
        assert dict(told.prompt_ms(0.0))[CHUNK] < cold
    limited = of(bundle, replace(settings, flash_mb_s=1.0))
    with paged(bundle, settings.budget, bytes_per_second=3e6) as (part, store):
        limited.store = store
        before = dict(limited.prompt_ms(0.0))[CHUNK]
        sequence = part.open()
        for at in range(40):
            part.step(Rows().tokens(sequence, at, [at], want=Want.NONE))
        seen = dict(limited.prompt_ms(0.0))[CHUNK]
        assert seen < before  # three times as fast as was said, and some are there


def test_what_was_recorded_is_believed_first(bundle: Bundle) -> None:
    settings = ExpertSettings(8 * record_bytes(bundle) / 1e6)
    write_facts(bundle, 0, 1, Facts(50.0, 0.05, 6.0, 0.1, 0.02, True))
    guessed = full(of(bundle, settings), settings.budget).token_ms()
    chosen = [[e % 8, (e + 3) % 8] for e in range(200)]
    write_routing(bundle, record(chosen), "a text")
    known = foretell(bundle, settings, 1)
    assert known is not None
    assert full(of(bundle, settings), settings.budget).token_ms() == pytest.approx(known.mean_ms - known.compute_ms)
    assert full(of(bundle, settings), settings.budget).token_ms() != guessed


def test_a_stopwatch_leaves_out_what_was_waited_for_experts() -> None:
    watch = Stopwatch(Sizes(3, 1e6, 1e6), still, stalls())
    part = open_part(RandomModel("q4", random_config()))
    for at in range(ENOUGH):
        watch.saw(Rows().tokens(part.open(), at, [1], want=Want.NONE), part, 5.0, 4.0)
    assert watch.ms_per_mb * 3 == pytest.approx(1000.0)
    assert watch.stalls is not None and watch.stalls.token_ms() > 200
    part.close()


def test_a_single_long_wait_counts_for_little_and_none_for_ever() -> None:
    now = [0.0]
    one = stalls(token_ms=10.0, clock=lambda: now[0])
    one.saw(1, 1.0, 60_000.0, 0.0)
    assert one.token_ms() == pytest.approx((4 * 10 + BOUND * 10) / 5)
    for _ in range(50):
        one.saw(1, 1.0, 500.0, 0.0)
    assert one.token_ms() > 300
    now[0] = 20 * HALF_S
    assert one.token_ms() == pytest.approx(10.0, rel=0.01)  # as nothing was computed here for long


class _Waiting:
    """A part whose steps wait for experts, and take no other time."""

    def __init__(self, clock: list[float]) -> None:
        self.clock, self.waited = clock, 0.0

    def step(self, rows: Rows) -> None:
        """Waits a second, computes for another."""
        self.waited += 1.0
        self.clock[0] += 2.0


def test_a_slower_processor_has_no_slower_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, slept = [0.0], list[float]()
    part = slowed(cast(Part, _Waiting(clock)), 3.0)
    assert waited(part) == 0.0
    monkeypatch.setattr(part, "_clock", lambda: clock[0])
    monkeypatch.setattr(part, "_sleep", slept.append)
    part.step(Rows())
    assert slept == [2.0] and waited(part) == 1.0


def known(token_ms: float, trip_ms: float, cloud_ms: float = 5.0, prompt_ms: float = 0.0) -> Figures:
    waits = Waits(token_ms, ((1, 0.0), (2, prompt_ms)))
    device = DeviceFigures(30, 30, ((30, 8.0),), 2.0, 0.0, 0.5, waits=waits)
    cloud = CloudFigures(30, ((1, cloud_ms), (4, 2 * cloud_ms)), 1.0, 1.0)
    return Figures(device, cloud, LinkFigures(trip_ms, trip_ms, 1e7, 1e7, 1e7, 1e7))


def asked(figures: Figures, *, own: bool, remaining: int = 100, missing: float = 1.0, plan: Plan | None = None) -> Plan:
    standing = Standing(remaining, ((30, missing),), 1, current=plan.choice if plan else None)
    return decide(figures, Wish(own=own), standing)


def test_waits_are_part_of_a_tokens_and_a_prompts_time() -> None:
    device = known(30.0, 10.0, prompt_ms=60.0).device
    assert device.token_ms == 40.0 and device.through(15) == 19.0 and device.prefill(2, 30) == 61.0
    assert asked(known(30.0, 10.0, 45.0), own=False).choice.mode == "local"
    assert asked(known(40.0, 10.0, 45.0), own=False).choice.mode == "stream"
    assert asked(known(0.0, 10.0, 45.0, 9_000.0), own=False, missing=3.0).choice.mode == "stream"


def test_own_experts_answer_while_they_are_waited_for_for_less_than_a_round_trip() -> None:
    for wait, trip, mode in ((9.0, 10.0, "local"), (11.0, 10.0, "stream"), (11.0, 12.0, "local")):
        plan = asked(known(wait, trip), own=True)
        assert plan.choice.mode == mode
        assert asked(known(wait, trip), own=False).choice.mode == "stream"  # which is faster
    assert "a token waits 9.0 ms for experts here, and a round trip takes 10.0" in asked(known(9, 10), own=True).reason
    assert (
        "; a token waits 11.0 ms for experts here, and a round trip takes 10.0" in asked(known(11, 10), own=True).reason
    )
    assert "11.0 ms of a token wait for experts" in explain(asked(known(11, 10), own=True))
    assert "wait for experts" not in explain(asked(known(0, 10), own=True))


def test_a_prompts_waits_are_shared_by_the_tokens_that_follow() -> None:
    waiting = known(2.0, 10.0, prompt_ms=400.0)
    assert asked(waiting, own=True, remaining=100, missing=3.0).choice.mode == "local"
    assert asked(waiting, own=True, remaining=20, missing=3.0).choice.mode == "stream"
    there = asked(waiting, own=True, remaining=100, missing=3.0)
    assert asked(waiting, own=True, remaining=20, missing=1.0, plan=there).choice.mode == "local"


def test_a_cloud_that_was_asked_is_left_for_somewhat_less_than_a_round_trip() -> None:
    there = asked(known(20.0, 10.0), own=True)
    assert there.choice.mode == "stream"
    assert asked(known(9.9, 10.0), own=True, plan=there).choice.mode == "stream"
    assert asked(known(9.9 * (1 - MARGIN), 10.0), own=True, plan=there).choice.mode == "local"


def test_what_goes_with_asking_a_cloud(bundle: Bundle) -> None:
    settings = ExpertSettings(2.0, mode="cloud")
    with pytest.raises(DeviceError, match="none is named"):
        Device(bundle, experts=settings)
    with pytest.raises(DeviceError, match="the mode is stream"):
        Device(bundle, "tcp://127.0.0.1:1", experts=settings, mode="stream", encrypted=False)
    for prefer in ("privacy", "cloud-cost"):
        with pytest.raises(DeviceError, match=f"{prefer} is preferred"):
            as_wish(prefer, 0.0, "auto", own=True)
    assert as_wish("speed", 0.0, "auto", own=True) == Wish(own=True)
    with pytest.raises(DeviceError, match="read with 4 bits, and the cloud's model has more"):
        Device(bundle, "tcp://127.0.0.1:1", experts=ExpertSettings(2.0, bits=4), encrypted=False)
    assert priors.watch(bundle, None, 1, still, True).stalls is None
    assert priors.watch(bundle, settings, 1, still, False).stalls is None
    assert priors.watch(bundle, settings, 1, still, True).stalls is not None
    bundle.path.joinpath(expert_file(1)).write_bytes(b"damaged")
    assert priors.watch(bundle, settings, 1, still, True).stalls is None  # who opens them says so


def test_what_steps_of_a_device_wait_for_is_seen_and_a_store_that_is_closed_is_not_asked(bundle: Bundle) -> None:
    settings = ExpertSettings(4 * record_bytes(bundle) / 1e6, flash_mb_s=1.0)
    watch = priors.watch(bundle, settings, 1, still, True)
    watch = Stopwatch(watch.sizes, perf_counter, watch.stalls)
    assert watch.stalls is not None and watch.stalls.store is None
    before = watch.stalls.token_ms()
    room: dict[str, Any] = {"memory_mb": None, "kv_tokens": 64, "window": 0, "backend": "auto", "threads": 1}
    holding = Holding(bundle, experts=settings, watch=watch, **room)
    part = holding.open(3).part
    sequence = part.open()
    for at in range(8):
        part.step(Rows().tokens(sequence, at, [at], want=Want.NONE))
    assert waited(part) > 0 and watch.stalls.token_ms() != before and watch.knows
    assert holding.store is not None and id(watch.stalls.store) == id(holding.store)
    held = dict(watch.stalls.prompt_ms(0.0))[CHUNK]
    holding.close()
    assert watch.stalls.store is None and dict(watch.stalls.prompt_ms(0.0))[CHUNK] > held


def test_what_is_known_of_flash() -> None:
    one = stalls()
    assert one.mb_s == 0.0
    one.remember(200.0)
    assert one.mb_s == 200.0 and one.token_ms() == pytest.approx(5 * stalls(mb_s=1000.0).token_ms())
    one.remember(300.0)
    assert one.mb_s == 200.0 == stalls(limit_mb_s=200.0).mb_s == stalls(mb_s=500.0, limit_mb_s=200.0).mb_s
    assert stalls(mb_s=100.0, limit_mb_s=200.0).mb_s == 100.0


def test_waits_that_cannot_be(bundle: Bundle) -> None:
    for waits in (Waits(-1.0), Waits(0.0, ((2, 1.0), (1, 1.0))), Waits(0.0, ((1, -1.0),))):
        with pytest.raises(DeviceError):
            DeviceFigures(30, 30, ((30, 8.0),), 2.0, 0.0, 0.5, waits=waits)


def test_experts_that_may_not_answer_are_named() -> None:
    figures = known(1.0, 10.0)
    assert figures.cloud is not None
    other = replace(figures, cloud=replace(figures.cloud, same_model=False))
    assert "experts may not answer: the cloud's model is another one" in asked(other, own=True).reason
    assert "may not answer" not in asked(other, own=False).reason


def test_what_would_be_computed_again_must_be_worth_it() -> None:
    there, slow = asked(known(20.0, 10.0), own=True), replace(known(1.0, 10.0).device, prefill_row_ms=20.0)
    again = replace(known(1.0, 10.0), device=slow)
    assert asked(again, own=True, missing=101.0).choice.mode == "local"
    assert asked(again, own=True, missing=101.0, plan=there).choice.mode == "stream"
    assert asked(again, own=True, missing=11.0, plan=there).choice.mode == "local"
