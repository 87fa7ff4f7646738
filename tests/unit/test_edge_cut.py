"""A session in the cloud that is cut back to what is known of it: rows follow at once, whatever becomes of the cut."""

from __future__ import annotations

import pytest

from isthmus.edge.events import Aligned, Answered, Behind, Streamed
from isthmus.edge.lane import Lane
from isthmus.edge.session import Session
from isthmus.protocol import messages as m
from tests.unit.test_edge_session import events, fault, opened, result, rows, sent


def cut() -> tuple[Session, Lane]:
    """A session whose rows followed a cut to 2 tokens at once."""
    session, lane = opened(3)
    session.align(lane, 2, 1.0)
    assert events(session) == [Aligned(lane)] and lane.ahead == 2
    assert sent(session) == [m.Truncate(1, lane.epoch, 2)]
    rows(session, lane, 2)
    return session, lane


def test_rows_follow_a_cut_to_what_is_known_without_waiting_for_its_answer() -> None:
    session, lane = cut()
    trips = session.round_trips
    session.receive(result(session, lane, 2, [], 2), 1.1)
    assert events(session) == []
    session.receive(result(session, lane, 2, [9], 4), 1.2)
    assert events(session) == [Answered(lane, 2, [9])]
    assert (session.wake_at, session.round_trips) == (float("inf"), trips + 1)


def test_the_answer_to_a_cut_may_come_late_or_never() -> None:
    session, lane = cut()
    session.receive(result(session, lane, 2, [9], 4), 1.1)
    assert events(session) == [Answered(lane, 2, [9])] and session.wake_at == float("inf")
    session.receive(result(session, lane, 2, [], 2), 1.2)  # overtaken by what followed it
    assert events(session) == [] and lane.committed == 4


def test_patience_begins_with_the_question_not_with_the_cut_before_it() -> None:
    session, lane = opened(3)
    session.align(lane, 2, 1.0)
    assert session.wake_at == float("inf")  # the device may compute for long now
    session.tick(500.0, up=False)
    assert events(session) == [Aligned(lane)] and len(sent(session)) == 1
    session.rows(lane, m.Rows(1, lane.epoch, 2, session.log.at(2), session.log.tokens[2:], None), 500.0)
    session.tick(500.1, up=False)
    assert events(session) == []
    session.cancel(lane)
    assert lane.epoch == 2 and isinstance(sent(session)[-1], m.Cancel)


def test_a_cut_that_was_not_answered_is_nothing_to_cancel() -> None:
    session, lane = opened(3)
    session.align(lane, 2, 1.0)
    sent(session)
    session.cancel(lane)
    assert sent(session) == [] and lane.opened


def test_a_cut_confirms_what_was_sent_ahead() -> None:
    session, lane = opened(1)
    lane.filled(3, session.log.at(3))
    session.align(lane, 2, 1.0)
    assert (lane.agreed, lane.ahead) == (1, 2)
    session.receive(result(session, lane, 2, [], 2), 1.1)
    assert (lane.agreed, lane.committed, lane.head) == (2, 2, session.log.at(2))


@pytest.mark.parametrize(("committed", "head"), [(1, None), (0, None), (2, b"y" * 16)])
def test_a_cloud_that_holds_less_than_a_cut_left_is_asked_where_it_stands(committed: int, head: bytes | None) -> None:
    session, lane = cut()
    held = session.log.at(committed) if head is None else head
    session.receive(m.Result(1, lane.epoch, 2, [], committed, held), 1.1)
    assert events(session) == [Behind(lane)]
    session.align(lane, 3, 1.2)
    assert isinstance(sent(session)[0], m.Open)


def test_a_cut_that_was_lost_has_the_lane_opened_again() -> None:
    session, lane = cut()
    session.receive(fault(lane, m.Code.STALE_EPOCH, 2), 1.1)
    assert events(session) == [Behind(lane)]


def test_a_cut_is_not_repeated_and_a_doubled_one_may_be_answered_after_what_followed_it() -> None:
    session, lane = opened(3)
    session.align(lane, 2, 1.0)
    request = m.Generate(1, lane.epoch, 2, session.log.at(2), session.log.tokens[2:], 8)
    session.generate(lane, request, 1.0)
    _, asking = sent(session)
    session.tick(session.wake_at)
    assert sent(session) == [asking]
    events(session)
    session.receive(result(session, lane, 2, [], 4), 2.1)  # its tokens were lost: they come again
    assert events(session) == []
    session.receive(m.Tokens(1, lane.epoch, 4, [9], False, "", 4, session.log.at(4)), 2.2)
    assert events(session) == [Streamed(lane, [9], False, "")]


def test_what_was_given_up_is_cut_away_and_nobody_waits() -> None:
    session, lane = opened(2)
    rows(session, lane, 2)
    session.cancel(lane)
    session.align(lane, 3, 2.0)
    assert events(session) == [Aligned(lane)] and lane.ahead == 2
    assert sent(session) == [m.Cancel(1, 1), m.Truncate(1, 2, 2)]
    asked = rows(session, lane, 2)
    session.receive(m.Result(1, 1, 2, [8], 4, session.log.at(4)), 2.1)  # of what was given up
    session.receive(result(session, lane, 2, [], 2), 2.2)
    assert events(session) == []
    session.receive(result(session, lane, asked.position, [9], 4), 2.3)
    assert events(session) == [Answered(lane, 2, [9])]
    session.align(lane, 4, 3.0)
    assert events(session) == [Aligned(lane)] and sent(session) == []  # nothing was given up since


def test_it_is_cut_away_as_often_as_something_is_given_up() -> None:
    session, lane = opened(2)
    for epoch in (2, 3, 4):
        rows(session, lane, 2)
        session.cancel(lane)
        session.align(lane, 3, 2.0)
        assert events(session) == [Aligned(lane)]
        assert sent(session) == [m.Cancel(1, epoch - 1), m.Truncate(1, epoch, 2)]


def test_rows_that_were_sent_ahead_are_asked_for() -> None:
    session, lane = opened(0)
    lane.filled(3, session.log.at(3))
    rows(session, lane, 3)
    session.cancel(lane)
    session.align(lane, 3, 2.0)
    assert events(session) == []
    cancelled, ask = sent(session)
    assert isinstance(cancelled, m.Cancel) and isinstance(ask, m.Open)
    session.receive(m.Opened(1, ask.epoch, 3, session.log.at(3), "toy", "f16"), 2.1)
    assert events(session) == [Aligned(lane)] and lane.ahead == 3


def test_a_session_that_the_cloud_has_lost_meanwhile_is_opened_again() -> None:
    session, lane = opened(2)
    rows(session, lane, 2)
    session.cancel(lane)
    session.align(lane, 3, 2.0)
    events(session), sent(session)
    rows(session, lane, 2)
    session.receive(fault(lane, m.Code.UNKNOWN_SESSION), 2.1)
    assert events(session) == [Behind(lane)] and not lane.opened


def test_a_session_that_slides_is_asked_where_it_stands() -> None:
    """The cloud may have streamed on past its window, and there is no way back from there."""
    session, lane = opened(2, window=8)
    rows(session, lane, 2)
    session.cancel(lane)
    session.align(lane, 3, 2.0)
    assert events(session) == [] and isinstance(sent(session)[-1], m.Open)


def test_what_a_stream_has_said_need_not_be_computed_again() -> None:
    session, lane = opened(2)
    session.generate(lane, m.Generate(1, 1, 2, session.log.at(2), session.log.tokens[2:], 8), 1.0)
    ahead = session.log.copy()
    ahead.extend((7, 8, 9))
    session.receive(m.Tokens(1, 1, 4, [7, 8, 9], False, "", 6, ahead.at(6)), 1.1)
    session.log.extend((7,))  # of three tokens the reader took one
    events(session), sent(session)
    session.cancel(lane)
    session.align(lane, 5, 2.0)
    assert events(session) == [Aligned(lane)] and lane.ahead == 5
    assert sent(session) == [m.Cancel(1, 1), m.Truncate(1, 2, 5)]
