"""The simulator: links as the relay's, modes by closed forms where links are constant, auto by what it can see."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.apps.bench import facts, simulate
from isthmus.apps.bench.facts import Answer, ExitFacts
from isthmus.apps.bench.shaping import MS, BenchError, Pipe
from isthmus.apps.bench.simulate import LinkPlan, Outcome, Point, Window, play_auto, play_fixed
from isthmus.apps.bench.virtual import Engine, Way, World
from isthmus.edge.costs import Candidate
from isthmus.edge.figures import ExitFigures, Wish, round_of
from isthmus.split.traces import Trace, synthetic

LAYERS_MS = {1: 0.25, 20: 5.0, 30: 7.5}
ROWS_MS = {1: 9.5, 2: 10.5, 3: 12.0, 5: 16.0, 9: 33.0}
HEAD_MS, PREFILL_MS = 2.0, 2.0
TOKENS = 2000
ANSWERS = facts.made_up(20, 60, 0.6)
LONG = facts.made_up(1, TOKENS, 0.6, seed=1)
STEP_MS = 5.0 + 0.25 + 2.0  # of a device that is as fast as this machine, before layer 20 and in an exit
EXIT = ExitFigures(
    20, 0.9, 0.4, 0.0, 0.05, 384.0
)  # of which made-up answers say that it is right wherever it is so sure


def point(rtt_ms: float, slow: float = 1.0, factor: float = 1.0, held: int = 30) -> Point:
    device = simulate.device_figures(LAYERS_MS, HEAD_MS, PREFILL_MS, slow=slow, held=held)
    cloud = simulate.cloud_figures(ROWS_MS, HEAD_MS, PREFILL_MS, 30, factor=factor)
    return simulate.point(device, cloud, LinkPlan(rtt_ms), ANSWERS, [EXIT])


def fixed(point: Point, mode: str, answers: tuple[Answer, ...] = LONG, **wanted: object) -> Outcome:
    choice = next(
        one
        for one in simulate.fixed_modes(point, Wish("speed", 0.05))
        if one.mode == mode and all(getattr(one, name) == value for name, value in wanted.items())
    )
    return play_fixed(point, choice, Window(0.0, answers))


def test_local_is_a_prefill_and_a_step_for_each_token() -> None:
    outcome = fixed(point(50, slow=4), "local")
    assert outcome.seconds * 1e3 == pytest.approx(4 * (99 * 2.0 + TOKENS * 9.5), rel=1e-6)
    assert (outcome.tokens, outcome.wrong, outcome.cloud_ms) == (TOKENS, 0, 0)


def test_stream_pays_the_round_trip_once() -> None:
    outcome = fixed(point(200, factor=8), "stream")
    assert outcome.seconds * 1e3 == pytest.approx(200 + 8 * (99 * 2.0 + TOKENS * 9.5), rel=1e-6)


def test_split_pays_it_for_each_token() -> None:
    outcome = fixed(point(50, slow=4, factor=8, held=20), "split", codec="f32")
    prompt = 4 * 99 * 2.0 * 20 / 30
    cloud_prompt = 8 * ((33 - 2) / 3 + 91 * 2.0 / 3 + 2)
    rest = 8 * (7.5 / 3 + 2)
    assert outcome.seconds * 1e3 == pytest.approx(
        prompt + TOKENS * (20 + 50) + cloud_prompt + (TOKENS - 1) * rest, rel=1e-6
    )


def test_exit_asks_where_it_is_not_sure() -> None:
    here = point(50, slow=1, factor=8, held=20)
    right, outcome = LONG[0].exits[20].right, fixed(here, "exit")
    device = 99 * 2.0 * 20 / 30 + TOKENS * STEP_MS
    cloud, pending = 0.0, 100
    for sure in right:
        if not sure:  # the rows that were skipped ride along
            cloud, pending = cloud + 50 + here.cloud.rest(20, pending), 0
        pending += 1
    assert outcome.seconds * 1e3 == pytest.approx(device + cloud, rel=1e-6)
    assert outcome.wrong == 0
    gambles = ExitFacts(tuple(0.9 if one else 0.2 for one in right), right)
    # In vain, and an answer that comes sooner than it is due waits for what is being said.
    late = fixed(here, "exit", (replace(LONG[0], exits={20: gambles}),)).seconds - outcome.seconds
    assert 0.0 < late * 1e3 < STEP_MS * right.count(False)


def unsure(confidence: tuple[float, ...], right: tuple[bool, ...], times: int = 100) -> tuple[Answer, ...]:
    """One answer along which an exit repeats itself."""
    count = times * len(right)
    return (Answer(100, (0,) * count, (0,) * count, {20: ExitFacts(confidence * times, right * times)}),)


def test_exit_guesses_on_and_asks_about_all_at_once() -> None:
    here = point(50, slow=1, factor=8, held=20)
    # Half as sure twice, then hardly: three tokens a question, of which the cloud corrects the last.
    outcome = fixed(here, "exit", unsure((0.5, 0.5, 0.1), (True, True, False)))
    device = 99 * 2.0 * 20 / 30 + 300 * 7.25
    cloud = 100 * 50 + here.cloud.rest(20, 102) + 99 * here.cloud.rest(20, 3)
    assert outcome.seconds * 1e3 == pytest.approx(device + cloud, rel=1e-6)


@pytest.mark.parametrize("right", [True, False])
def test_what_was_said_while_an_answer_was_awaited_counts_if_all_was_right(right: bool) -> None:
    here = point(50, slow=1, factor=8, held=20)
    outcome = fixed(here, "exit", unsure((0.5, 0.3), (True, right)))
    prompt_ms = 99 * 2.0 * 20 / 30
    cloud_ms = 100 * 50 + here.cloud.rest(20, 101) + 99 * here.cloud.rest(20, 2)
    whole_ms = prompt_ms + 200 * STEP_MS + cloud_ms
    if right:  # all but the first two tokens are said by then; the prompt's answer had the next ones due too late
        assert prompt_ms + 2 * STEP_MS + cloud_ms < outcome.seconds * 1e3 < whole_ms - 180 * STEP_MS
    else:
        assert whole_ms < outcome.seconds * 1e3 < whole_ms + 20 * STEP_MS


def test_a_block_is_verified_in_one_round() -> None:
    here = point(50, slow=4, factor=1, held=20)
    for g in (1, 2, 4):
        outcome = fixed(here, "verify", source="exit", draft_tokens=g, depth=1)
        check = dict(ROWS_MS).get(g + 1)
        assert check
        foreseen = sum(LONG[0].exits[20].right) / TOKENS
        a_round = g * 4 * 7.25 + 50 + check
        a_round += foreseen**g * 4 * 2.0 * 20 / 30
        assert outcome.seconds * 1e3 / TOKENS == pytest.approx(a_round / round_of(foreseen, g), rel=0.03)


def test_blocks_in_a_pipe_cost_a_trip_for_each_miss() -> None:
    here = point(50, slow=4, factor=1, held=20)
    outcome = fixed(here, "verify", source="exit", draft_tokens=1, depth=8)
    a, draft = sum(LONG[0].exits[20].right) / TOKENS, 4 * 7.25
    # The correction comes after 59.5 ms, in the third draft that it voids.
    assert outcome.seconds * 1e3 / TOKENS == pytest.approx(a * draft + (1 - a) * (3 * draft + draft), rel=0.02)


@pytest.mark.parametrize("rtt_ms", [5, 50, 200])
@pytest.mark.parametrize(("slow", "factor", "held"), [(1, 1, 30), (4, 1, 20), (1, 8, 20), (4, 8, 20), (4, 8, 30)])
def test_the_policys_price_is_what_the_simulator_finds(rtt_ms: float, slow: float, factor: float, held: int) -> None:
    here = point(rtt_ms, slow, factor, held)
    for choice in simulate.fixed_modes(here, Wish("speed", 0.05)):
        outcome = play_fixed(here, choice, Window(0.0, LONG))
        assert outcome.seconds * 1e3 / TOKENS == pytest.approx(
            choice.ms_per_token, rel=0.2 if choice.depth > 1 else 0.12
        ), choice.name


@pytest.mark.parametrize("loss", [0.0, 0.05])
@pytest.mark.parametrize("rtt_ms", [5, 50, 200])
@pytest.mark.parametrize(("slow", "factor", "held"), [(1, 1, 30), (4, 1, 20), (1, 8, 20), (4, 8, 20), (4, 8, 30)])
def test_auto_is_near_the_best_on_a_constant_link(
    rtt_ms: float, slow: float, factor: float, held: int, loss: float
) -> None:
    here, wish = point(rtt_ms, slow, factor, held), Wish("speed", loss)
    window = Window(0.0, ANSWERS[:4])
    best = min(play_fixed(here, one, window).seconds for one in simulate.fixed_modes(here, wish))
    outcome = play_auto(here, wish, window)
    assert outcome.seconds <= 1.1 * best
    assert outcome.tokens == 240


@pytest.mark.parametrize("tokens", [4, 16])
@pytest.mark.parametrize("rtt_ms", [5, 200])
@pytest.mark.parametrize(("slow", "factor", "held"), [(1, 1, 30), (4, 1, 20), (1, 8, 20), (4, 8, 30)])
def test_auto_does_not_know_that_an_answer_will_be_short(
    rtt_ms: float, slow: float, factor: float, held: int, tokens: int
) -> None:
    here, wish = point(rtt_ms, slow, factor, held), Wish("speed", 0.05)
    window = Window(0.0, facts.made_up(4, tokens, 0.6))
    fixed = {one.name: play_fixed(here, one, window).seconds for one in simulate.fixed_modes(here, wish)}
    alone = min(seconds for name, seconds in fixed.items() if name in ("local", "stream"))
    outcome = play_auto(here, wish, window)
    assert outcome.tokens == 4 * tokens
    assert 0.9 * outcome.seconds <= alone


def test_auto_drafts_with_n_grams_where_they_come_true() -> None:
    cycle = (4, 3, 2, 1, 0)  # of four drafts all come true, and after them none is made
    repeated = Answer(100, cycle * 24, cycle * 24, {20: facts.ExitFacts((0.1,) * 120, (False,) * 120)})
    device = simulate.device_figures(LAYERS_MS, HEAD_MS, PREFILL_MS, slow=4, held=20)
    cloud = simulate.cloud_figures(ROWS_MS, HEAD_MS, PREFILL_MS, 30, factor=8)
    wish, window = Wish(), Window(0.0, (repeated,) * 4)
    once = (1, *[0] * 4) * 24
    rare = Answer(100, once, once, repeated.exits)
    for known in (repeated, rare):  # before, or seen for nothing while the answer is made in another way
        here = simulate.point(device, cloud, LinkPlan(5), [known], [EXIT])
        best = min(play_fixed(here, one, window).seconds for one in simulate.fixed_modes(here, wish))
        streamed = fixed(here, "stream", window.answers).seconds
        outcome = play_auto(here, wish, window)
        assert best < 0.6 * streamed
        assert outcome.used["verify"] > 240 and outcome.seconds <= (1.1 if known is repeated else 2.0) * best, outcome


def test_auto_goes_on_alone_through_an_outage() -> None:
    # Ten seconds of a good link, sixty of nothing.
    steady = [ms for ms in range(1, 10_001) for _ in range(2)]
    trace = Trace((*steady, 70_000))
    here = point(20, slow=4, factor=1)
    here = replace(here, link=LinkPlan(20, trace, trace))
    window = Window(9.0, facts.made_up(3, 120, 0.6))
    outcome = play_auto(here, Wish(), window)
    stuck = fixed(here, "stream", window.answers)
    streamed = play_fixed(here, Candidate("stream"), window)
    assert streamed.seconds > 60 > 20 > outcome.seconds
    assert stuck.seconds < 10
    assert outcome.used["local"] > 0 and outcome.used["stream"] > 0


def test_a_window_repeats_exactly() -> None:
    trace = synthetic(7, 60, 1_000_000)
    here = replace(point(20, 1, 8, 20), link=LinkPlan(20, trace, trace))
    window = Window(5.0, ANSWERS[:3])
    assert play_auto(here, Wish("speed", 0.05), window) == play_auto(here, Wish("speed", 0.05), window)


def test_nothing_is_sent_for_privacy() -> None:
    here = point(20, slow=4, factor=1)
    game = play_auto(here, Wish("privacy"), Window(0.0, ANSWERS[:2]))
    assert set(game.used) == {"local"} and game.cloud_ms == 0


sends = st.lists(st.tuples(st.integers(0, 40 * MS), st.integers(1, 6000)), min_size=1, max_size=30)


@settings(deadline=None)
@given(
    sends,
    st.sampled_from([(None, None), (500_000, None), (3_000_000, None), (None, 0), (None, 1)]),
    st.floats(0, 30),
    st.integers(-2_000, 0),
)
def test_a_way_delivers_when_the_relays_pipe_does(
    asked: list[tuple[int, int]], kind: tuple[int | None, int | None], delay_ms: float, start_ms: int
) -> None:
    rate, which = kind
    traces = [Trace((1, 1, 3, 40, 41, 300)), synthetic(3, 2, 400_000)]
    trace = None if which is None else traces[which]
    start = start_ms * MS
    way = Way(delay_ms, rate, trace, start)
    pipe: Pipe[int] = Pipe(delay_ms, rate_bps=rate, trace=trace, start_ns=start, queue_bytes=2**40)
    # A rate's or a trace's place is known at 0, where the pipe's last piece ended when it began.
    pipe._free = pipe._last_ready = 0
    now, due = 0, []
    for i, (gap, size) in enumerate(asked):
        now += gap
        due.append(way.send(now, size))
        pipe.push(now, memoryview(bytes(size)), i)
    left = dict(enumerate(size for _, size in asked))
    arrived = {}
    while left:
        at = pipe.next_ns()
        assert at is not None
        for data, i in pipe.pop(at):
            left[i] -= len(data)
            if not left[i]:
                arrived[i] = at
                del left[i]
    assert [arrived[i] for i in range(len(due))] == due


def test_the_engine_serves_in_turn_and_drops_what_is_stale() -> None:
    world = World()
    engine = Engine(world)
    ended: list[tuple[int, float, float]] = []

    def job(ms: float | None) -> None:
        engine.submit(lambda: ms, lambda now, took, queue: ended.append((now // MS, took, queue)))

    job(10)
    job(None)
    job(5)
    world.work(12)
    assert ended == [(10, 10, 0)]
    world.work(10)
    assert ended == [(10, 10, 0), (15, 15, 10)]
    assert engine.busy_ms == 15


def test_a_device_that_waits_for_nothing_is_an_error() -> None:
    with pytest.raises(BenchError, match="waits for nothing"):
        World().wait()


def test_facts_there_and_back(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    told = facts.Facts((ExitFigures(20, 0.9, 0.4, 0.0, 0.05, 384.0),), ANSWERS, {20: 1.0})
    facts.write(told, path)
    assert facts.read(path) == told
    path.write_text(json.dumps({"exits": [], "answers": [{"prompt": 1}]}))
    with pytest.raises(BenchError, match="holds no facts"):
        facts.read(path)
    with pytest.raises(BenchError, match="differ in length"):
        Answer(5, (1, 0), (1,), {})


def test_drafts_are_counted_in_rounds() -> None:
    answer = Answer(1, (2, 2, 1, 0), (2, 0, 1, 0), {20: ExitFacts((0.9,) * 4, (True, False, True, True))})
    ngrams = facts.draft_figures([answer], 0, 0.0, (2,))
    assert ngrams.tokens_a_round == ((2, 2.0),)  # two drafts and a token, then one without a draft
    assert ngrams.rows_a_round == ((2, 2.0),)
    exits = facts.draft_figures([answer], 20, 7.0, (2,))
    assert exits.tokens_a_round == ((2, 2.0),) and exits.accepted == 0.75
