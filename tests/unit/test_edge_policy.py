"""What "auto" means: the right way for each situation, never a forbidden one, and always the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.edge.costs import Candidate, Standing, candidates
from isthmus.edge.figures import (
    CloudFigures,
    CodecFigures,
    DeviceFigures,
    DraftFigures,
    ExitFigures,
    Figures,
    LinkFigures,
    Wish,
    round_of,
)
from isthmus.edge.pace import LIKELY
from isthmus.edge.policy import MARGIN, PATIENCE, choose, decide, explain, worth_probing
from isthmus.protocol.errors import DeviceError

LAYERS_MS = ((1, 0.25), (20, 5.0), (30, 7.5))
ROWS_MS = ((1, 9.5), (2, 10.5), (3, 12.0), (5, 16.0), (9, 33.0))


def link(trip_ms: float, high_ms: float | None = None, mbps: float = 2.0) -> LinkFigures:
    rate = mbps * 1e6
    return LinkFigures(trip_ms, trip_ms if high_ms is None else high_ms, rate, rate, rate / 4, rate / 4)


def figures(
    trip_ms: float = 20.0, slow: float = 1.0, factor: float = 1.0, held: int = 30, same: bool = True
) -> Figures:
    device = DeviceFigures(held, 30, tuple((k, slow * ms) for k, ms in LAYERS_MS), 2 * slow, 0.25 * slow, 2 * slow)
    cloud = CloudFigures(30, tuple((n, factor * ms) for n, ms in ROWS_MS), 2 * factor, 2 * factor, 0.0, same)
    exits = (ExitFigures(20, 0.8, 0.62, 0.1, 0.05, 384), ExitFigures(20, 0.95, 0.8, 0.0, 0.01, 384))
    drafted = device.drafted(20)
    lengths = (1, 2, 4)
    drafts = (
        DraftFigures("ngram", 0, 0.0, 0.5, tuple((g, 1.2 + 0.1 * g) for g in lengths), ((1, 1.4), (4, 2.6))),
        DraftFigures(
            "exit",
            20,
            drafted,
            0.53,
            tuple((g, round_of(0.53, g)) for g in lengths),
            tuple((g, g + 1.0) for g in lengths),
        ),
    )
    codecs = (CodecFigures("f32", 2304, 0.0), CodecFigures("f16", 1152, 0.003))
    return Figures(device, cloud, link(trip_ms), exits, drafts, codecs)


FRESH = Standing(100, ((20, 1.0), (30, 1.0)), 1, ((20, 1.0),))
CHEAP, EXACT, LOOSE = Wish("cloud-cost"), Wish(), Wish("speed", 0.05)


@pytest.mark.parametrize(
    ("known", "wish", "mode"),
    [
        (figures(factor=1, slow=4), EXACT, "stream"),
        (figures(factor=8, slow=1), EXACT, "local"),
        (figures(factor=8, slow=4), EXACT, "local"),
        (figures(factor=1, slow=1), CHEAP, "local"),
        (figures(factor=1, slow=4, held=20), EXACT, "stream"),
        (figures(5, factor=8, held=20), EXACT, "split"),
        (figures(5, factor=8, held=20), LOOSE, "exit"),
        (figures(20, factor=8, held=20), LOOSE, "exit"),
        (figures(200, factor=8, held=20), LOOSE, "stream"),
        (figures(200, factor=8, held=20, same=False), LOOSE, "stream"),
        (figures(5, factor=8, slow=1, same=False), EXACT, "verify"),
        (figures(factor=1, slow=4), Wish("privacy"), "local"),
    ],
)
def test_the_way_for_a_situation(known: Figures, wish: Wish, mode: str) -> None:
    assert decide(known, wish, FRESH).choice.mode == mode


def test_prices_are_those_of_the_formulas() -> None:
    known = figures(trip_ms=50, slow=4, factor=8, held=20)
    found = {one.name: one.ms_per_token for one in candidates(known, LOOSE, FRESH)}
    assert found["stream"] == pytest.approx(76.0)
    # 1,252 bytes fit in one segment, 2,404 do not: 904 more at 2 Mbit/s take 3.6 ms.
    assert found["split 20 f16"] == pytest.approx(20 + 50 + 8 * (7.5 / 3 + 2))
    assert found["split 20 f32"] == pytest.approx(20 + 50 + 3.616 + 8 * (7.5 / 3 + 2))
    drafted = 20 + 1 + 8
    rest = 8 * (7.5 / 3 + 2)
    even = (drafted + 0.2 * rest) / (50 + rest)  # from which on a guess pays; some of a tenth are made
    asked = 0.62 - 0.1 * (0.8 - even) / (0.8 - LIKELY)
    assert 0.52 < asked < 0.62
    in_vain = 2.0 * (0.62 - asked) * drafted
    checked = 8 * ((7.5 + (1 / asked - 1)) / 3 + 2)  # of 1.7 rows
    assert found["exit 20 coded at 0.8"] == pytest.approx(drafted + in_vain + asked * (50 + checked))
    assert found["exit 20 coded at 0.95"] == pytest.approx(drafted + 0.8 * (50 + 8 * (7.75 / 3 + 2)))
    assert found["verify exit 20 x2"] == pytest.approx(
        (2 * drafted + 0.53**2 * 16 / 3 + 50 + 96) / (1 + 0.53 + 0.53**2)
    )
    assert found["verify exit 20 x2 pipelined"] == pytest.approx(0.53 * 84 / 2 + 0.47 * (50 + 84 + drafted * 2))


def test_a_stall_sends_a_device_with_the_whole_model_on_its_way() -> None:
    known = figures(20, slow=4, factor=1)
    streaming = replace(FRESH, current=decide(known, EXACT, FRESH).choice)
    assert streaming.current is not None and streaming.current.mode == "stream"
    assert known.link is not None

    def after(silent_ms: float) -> str:
        assert known.link is not None
        late = replace(known, link=replace(known.link, silent_ms=silent_ms))
        return decide(late, EXACT, streaming).choice.mode

    assert (after(100), after(10_000)) == ("stream", "local")


def test_a_late_link_is_no_reason_to_ask_in_another_way() -> None:
    known = replace(figures(5, factor=8, held=20), pace=(("exit", 3.0),))
    assert known.link is not None
    exiting = next(one for one in candidates(known, LOOSE, FRESH) if one.mode == "exit")
    standing = replace(FRESH, current=exiting)
    assert decide(known, LOOSE, standing).choice.mode != "exit"
    late = replace(known, link=replace(known.link, silent_ms=50.0))
    assert decide(late, LOOSE, standing).choice.mode == "exit"
    whole = replace(late, device=figures().device)
    assert decide(whole, LOOSE, standing).choice.mode == "local"


def test_an_uplink_is_measured_only_where_that_could_change_the_mode() -> None:
    known = replace(figures(5, factor=8, held=20), drafts=())
    streaming = replace(FRESH, hidden_missing=((20, 200.0),), current=Candidate("stream"))
    slow = replace(known, link=replace(link(5), up_bps=3e5, up_low_bps=3e5))
    assert decide(slow, LOOSE, streaming).choice.mode == "stream"
    assert worth_probing(slow, LOOSE, streaming)
    assert not worth_probing(slow, Wish("privacy"), streaming)
    assert not worth_probing(replace(slow, cloud=figures(factor=0.25).cloud), LOOSE, streaming)
    assert not worth_probing(slow, LOOSE, replace(streaming, current=Candidate("split", 20, "f32")))


def test_a_volatile_link_is_worth_less_than_its_median() -> None:
    calm, wild = link(20, 20), link(20, 400)
    known = replace(figures(20, factor=8, held=20), link=calm)
    assert decide(known, LOOSE, FRESH).choice.mode == "exit"
    assert decide(replace(known, link=wild), LOOSE, FRESH).choice.mode == "stream"


@pytest.mark.parametrize(("saved", "mode"), [(0.6 * MARGIN, "exit"), (1.6 * MARGIN, "stream")])
def test_what_is_in_use_stays_until_another_saves_enough(saved: float, mode: str) -> None:
    known = replace(figures(5, factor=8, held=20), drafts=())
    exit = decide(known, LOOSE, FRESH).choice
    standing = replace(FRESH, current=exit)
    found = {one.mode: one for one in sorted(candidates(known, LOOSE, standing), key=lambda one: -one.total_ms)}
    left, stream = standing.remaining, found["stream"]
    wanted = ((1 - saved) * found["exit"].total_ms - stream.setup_ms) / left / stream.ms_per_token
    plan = decide(replace(known, pace=(("stream", wanted), ("split", 3.0))), LOOSE, standing)
    assert exit.mode == "exit" and plan.choice.mode == mode
    assert ("goes on" in plan.reason) == (mode == "exit")


def test_a_mode_slower_than_its_formula_is_left() -> None:
    known = figures(20, factor=8, held=20)
    assert decide(replace(known, pace=(("exit", 3.0),)), LOOSE, FRESH).choice.mode != "exit"


def test_a_link_that_is_down() -> None:
    known = figures(20, factor=1, slow=4)
    assert known.link is not None
    down = replace(known, link=replace(known.link, up=False))
    assert decide(down, EXACT, FRESH).choice.mode == "local"
    other = replace(down, cloud=replace(known.cloud, same_model=False))  # type: ignore[type-var]
    assert decide(other, EXACT, FRESH).choice.mode == "local"
    with pytest.raises(DeviceError, match="does not answer"):
        decide(replace(down, device=replace(known.device, held=20)), EXACT, FRESH)


@pytest.mark.parametrize(
    ("known", "wish", "problem"),
    [
        (figures(held=20), Wish("privacy"), "nothing may be sent"),
        (Figures(figures(held=20).device), EXACT, "does not hold"),
    ],
)
def test_no_way_at_all(known: Figures, wish: Wish, problem: str) -> None:
    with pytest.raises(DeviceError, match=problem):
        decide(known, wish, FRESH)


def test_the_explanation_shows_every_way_and_why_not() -> None:
    known = figures(5, factor=8, held=20)
    plan = decide(known, EXACT, FRESH)
    told = explain(plan)
    assert told.startswith(plan.reason)
    ways = {one.name: (one.mode, one.source, one.depth > 1) for one in plan.candidates}
    shown = [ways[line[2:].split("  ")[0]] for line in told.splitlines()[3:]]
    assert sorted(shown) == sorted(set(ways.values()))
    assert "the device holds 20 of 30 layers" in told and "% of tokens may differ" in told
    for wish in (EXACT, LOOSE):
        told = explain(decide(known, wish, FRESH))
        assert sum(line.startswith("*") for line in told.splitlines()) == 1


situations = st.builds(
    figures,
    trip_ms=st.floats(0, 500),
    slow=st.sampled_from([0.5, 1.0, 4.0]),
    factor=st.sampled_from([0.25, 1.0, 8.0]),
    held=st.sampled_from([0, 10, 20, 25, 30]),
    same=st.booleans(),
)
wishes = st.builds(
    Wish, prefer=st.sampled_from(["speed", "cloud-cost", "privacy"]), max_disagreement=st.sampled_from([0, 0.01, 0.05])
)
standings = st.builds(
    lambda left, rows, hidden, greedy: Standing(
        left, ((20, rows), (30, rows)), int(rows), ((20, hidden),), greedy=greedy
    ),
    st.integers(1, 500),
    st.integers(1, 400).map(float),
    st.integers(1, 400).map(float),
    st.booleans(),
)


@settings(deadline=None)
@given(situations, wishes, standings)
def test_never_what_the_wish_or_the_device_forbids(known: Figures, wish: Wish, standing: Standing) -> None:
    try:
        plan = decide(known, wish, standing)
    except DeviceError:
        assert known.device.held < 30 and wish.prefer == "privacy"
        return
    choice = plan.choice
    assert choice.cut <= known.device.held
    if choice.mode == "local":
        assert known.device.held == 30
    if wish.prefer == "privacy":
        assert choice.mode == "local"
    elif known.cloud is not None and not known.cloud.same_model:
        assert choice.mode in ("stream", "verify")
    if choice.mode == "exit":
        assert standing.greedy
        certified = {one.threshold: one.disagreement for one in known.exits}
        assert certified[choice.threshold] <= wish.max_disagreement
    if wish.max_disagreement == 0:
        assert choice.mode != "exit" and choice.codec in ("", "f32")
    assert decide(known, wish, standing) == plan


@settings(deadline=None)
@given(situations, standings, st.floats(1.0, 5.0))
def test_a_longer_trip_never_makes_a_way_faster(known: Figures, standing: Standing, longer: float) -> None:
    assert known.link is not None
    slower = replace(known, link=replace(known.link, trip_ms=longer * known.link.trip_ms + 1, trip_high_ms=3000.0))
    for near, far in zip(candidates(known, LOOSE, standing), candidates(slower, LOOSE, standing), strict=True):
        assert near.key == far.key and near.total_ms <= far.total_ms
        assert near.mode != "local" or near.total_ms == far.total_ms


@settings(deadline=None)
@given(situations, standings)
def test_saving_the_clouds_time_costs_at_most_so_much(known: Figures, standing: Standing) -> None:
    fast = decide(known, Wish("speed", 0.05), standing).choice
    cheap = decide(known, Wish("cloud-cost", 0.05), standing).choice
    assert cheap.cloud_ms <= fast.cloud_ms
    assert cheap.total_ms <= PATIENCE * fast.total_ms


@settings(deadline=None)
@given(situations, standings)
def test_allowing_more_never_costs_time(known: Figures, standing: Standing) -> None:
    times = [decide(known, Wish("speed", d), standing).choice.total_ms for d in (0.0, 0.01, 0.05)]
    assert times == sorted(times, reverse=True)


def test_names_tell_candidates_apart() -> None:
    found = candidates(figures(held=20), LOOSE, FRESH)
    assert Candidate("verify", 20, source="exit", draft_tokens=4, depth=8).name == "verify exit 20 x4 pipelined"
    assert len({one.name for one in found}) == len(found)


@pytest.mark.parametrize(
    ("has_cloud", "link_up", "whole_model", "mode"),
    [
        (True, True, True, "stream"),
        (True, True, False, "stream"),
        (True, False, True, "local"),
        (False, False, True, "local"),
    ],
)
def test_the_cloud_while_it_answers_else_this_device(
    has_cloud: bool, link_up: bool, whole_model: bool, mode: str
) -> None:
    assert choose(has_cloud, link_up, whole_model) == mode


@pytest.mark.parametrize(("has_cloud", "problem"), [(True, "does not answer"), (False, "does not hold")])
def test_nobody_can_answer(has_cloud: bool, problem: str) -> None:
    with pytest.raises(DeviceError, match=problem):
        choose(has_cloud, False, False)


def test_an_exit_is_chosen_for_greedy_answers_alone() -> None:
    wish, known = Wish(max_disagreement=0.05), figures(trip_ms=100, slow=0.5, factor=8.0)
    for greedy in (True, False):
        found = [one for one in candidates(known, wish, replace(FRESH, greedy=greedy)) if one.mode == "exit"]
        assert found and all(("greedy" in one.why_not) is not greedy for one in found)
