"""The scheduler and admission: pure functions, so every rule is checked without a clock or a socket."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.cloud.admission import Load, ServiceLimits, held_tokens, misfit, refusal, share_sessions, share_tokens
from isthmus.cloud.scheduler import Demand, Pick, State, step
from isthmus.protocol.errors import ServiceError

LIMITS = ServiceLimits(max_step_rows=64, decode_rows=4, prefill_rows=32, prefill_rows_beside_decode=8)


@st.composite
def demands(draw: st.DrawFn) -> list[Demand]:
    rows = draw(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 200), st.integers(1, 30)), max_size=100))
    return [Demand(number, *fields) for number, fields in enumerate(rows)]


@given(demands(), st.dictionaries(st.sampled_from("abc"), st.integers(0, 500)), st.sampled_from(["", "a", "b", "c"]))
def test_every_step_keeps_the_limits(waiting: list[Demand], deficits: dict[str, int], turn: str) -> None:
    _, picks = step(State(deficits, turn), waiting, LIMITS)
    by_number = {demand.session: demand for demand in waiting}
    assert len({pick.session for pick in picks}) == len(picks)
    assert bool(picks) == bool(waiting)
    assert all(1 <= pick.rows <= by_number[pick.session].rows for pick in picks)
    assert sum(pick.rows for pick in picks) <= LIMITS.max_step_rows
    decode = [pick for pick in picks if by_number[pick.session].rows <= LIMITS.decode_rows]
    prefill = sum(pick.rows for pick in picks) - sum(pick.rows for pick in decode)
    assert all(pick.rows == by_number[pick.session].rows for pick in decode)
    assert prefill <= (LIMITS.prefill_rows_beside_decode if decode else LIMITS.prefill_rows)


def test_decode_goes_first_and_all_of_it() -> None:
    waiting = [Demand(0, "a", 200), *(Demand(number, "a", 1) for number in range(1, 20))]
    _, picks = step(State(), waiting, LIMITS)
    assert picks == [*(Pick(number, 1) for number in range(1, 20)), Pick(0, 8)]


def test_prefill_alone_takes_large_chunks() -> None:
    assert step(State(), [Demand(0, "a", 200)], LIMITS)[1] == [Pick(0, 32)]
    assert step(State(), [Demand(0, "a", 33)], LIMITS)[1] == [Pick(0, 32)]


def _served(waiting: list[Demand], steps: int) -> dict[str, int]:
    """Layer-rows that each principal got when its demands never end."""
    state, served = State(), dict.fromkeys((demand.principal for demand in waiting), 0)
    for _ in range(steps):
        state, picks = step(state, waiting, LIMITS)
        for pick in picks:
            demand = waiting[pick.session]
            served[demand.principal] += pick.rows * demand.layers
    return served


def test_principals_share_prefill_whatever_their_number_of_sessions() -> None:
    served = _served([Demand(0, "few", 500), *(Demand(number, "many", 500) for number in range(1, 20))], 200)
    assert served["few"] == pytest.approx(served["many"], rel=0.05)


def test_principals_share_layer_rows_not_rows() -> None:
    served = _served([Demand(0, "deep", 500, 30), Demand(1, "shallow", 500, 10)], 400)
    assert served["deep"] == pytest.approx(served["shallow"], rel=0.1)


def test_principals_share_decode_when_it_does_not_all_fit() -> None:
    served = _served([*(Demand(n, "few", 4) for n in range(10)), *(Demand(n, "many", 4) for n in range(10, 100))], 300)
    assert served["few"] == pytest.approx(served["many"], rel=0.3)


@given(demands().filter(bool))
def test_nobody_starves(waiting: list[Demand]) -> None:
    state, left = State(), {demand.session: demand for demand in waiting}
    for _ in range(sum(demand.rows for demand in waiting) + 1):
        if not left:
            break
        state, picks = step(state, list(left.values()), LIMITS)
        for pick in picks:
            demand = left.pop(pick.session)
            if demand.rows > pick.rows:
                left[pick.session] = Demand(pick.session, demand.principal, demand.rows - pick.rows, demand.layers)
    assert not left


EMPTY = Load(
    sessions=0,
    own_sessions=0,
    own_idle_sessions=0,
    idle_sessions=0,
    share_sessions=2,
    free_tokens=1024,
    idle_tokens=0,
    share_tokens=1024,
    own_tokens=0,
)


@pytest.mark.parametrize(
    ("load", "need", "refused"),
    [
        (EMPTY, 0, False),
        (EMPTY, 1024, False),
        (replace(EMPTY, share_tokens=512, own_tokens=496), 16, False),
        (replace(EMPTY, share_tokens=512, own_tokens=496), 32, True),
        (replace(EMPTY, share_tokens=512, own_tokens=512), 0, True),
        (replace(EMPTY, sessions=2, own_sessions=2), 0, True),
        (replace(EMPTY, sessions=2, own_sessions=2, share_sessions=3), 0, False),
        (replace(EMPTY, sessions=2, own_sessions=2, own_idle_sessions=1, idle_sessions=1), 0, False),
        (replace(EMPTY, sessions=3), 0, True),
        (replace(EMPTY, sessions=3, idle_sessions=1), 0, False),
        (replace(EMPTY, sessions=1, free_tokens=0), 0, True),
        (replace(EMPTY, sessions=1, free_tokens=96), 208, True),
        (replace(EMPTY, sessions=1, idle_sessions=1, free_tokens=96, idle_tokens=112), 208, False),
    ],
)
def test_admission(load: Load, need: int, refused: bool) -> None:
    assert (refusal(load, ServiceLimits(max_sessions=3), need) is not None) is refused


@pytest.mark.parametrize(
    ("positions", "window", "fits"),
    [
        (0, 0, True),
        (512, 0, True),
        (513, 0, False),
        (512, 5000, True),
        (513, 5000, False),
        (0, 320, True),
        (5000, 320, True),
        (0, 321, False),
        (0, 5000, False),
    ],
)
def test_what_a_session_may_come_to_hold_must_fit_its_owners_share(positions: int, window: int, fits: bool) -> None:
    why = misfit(positions, window, 512, ServiceLimits())
    assert (why is None) is fits
    if why is not None:
        assert "512" in why[0]
        assert ("kv_tokens of at most 320" if window else "overflow='slide'") in why[1]


def test_limits_check_themselves() -> None:
    with pytest.raises(ServiceError, match="max_sessions is 0"):
        ServiceLimits(max_sessions=0)
    with pytest.raises(ServiceError, match="max_step_rows"):
        ServiceLimits(max_step_rows=16)
    for name in ("kv_share", "session_share"):
        for share in (0.0, -0.5, 1.5, float("nan"), float("inf")):
            with pytest.raises(ServiceError, match=f"{name} is"):
                ServiceLimits(**{name: share})  # type: ignore[arg-type]


def test_a_share_is_whole_blocks_and_all_of_it_for_one_alone() -> None:
    limits = ServiceLimits(kv_share=0.3)
    assert share_tokens(1024, 1, limits) == 1024
    assert share_tokens(1024, 2, limits) == 304
    assert share_tokens(32, 9, limits) == 16
    assert [held_tokens(length, 0, limits) for length in (0, 1, 16, 17)] == [0, 16, 16, 32]
    assert [held_tokens(length, 100, limits) for length in (17, 304, 305, 10**6)] == [32, 304, 304, 304]


@pytest.mark.parametrize(
    ("principals", "max_sessions", "seats"),
    [(1, 4, 4), (1, 1, 1), (2, 4, 2), (9, 4, 2), (2, 2, 2), (2, 1, 1), (2, 256, 64)],
)
def test_seats_are_all_of_them_for_one_alone_and_else_two_at_least(
    principals: int, max_sessions: int, seats: int
) -> None:
    assert share_sessions(principals, ServiceLimits(max_sessions=max_sessions)) == seats
