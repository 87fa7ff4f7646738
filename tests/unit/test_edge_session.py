"""The device's session by hand: one message in, the right messages and events out."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from isthmus.edge.events import Aligned, Answered, Behind, Busy, Refused, Streamed, Timeouts, Up
from isthmus.edge.lane import Lane
from isthmus.edge.session import Session
from isthmus.protocol import messages as m
from isthmus.protocol.chain import ROOT, Chain
from isthmus.protocol.errors import (
    ConversationFullError,
    DeviceError,
    IsthmusError,
    LinkError,
    ServiceError,
    SlowLinkError,
)

TIMEOUTS = Timeouts(connect_ms=5000, retry_ms=1000, give_up_ms=3000, progress_ms=60_000)
LOG = [5, 6, 7, 8]


def welcome(model_id: str = "aa") -> m.Welcome:
    offer = m.Offer(model_id, "toy", 4, 8, 100, "toy", True, ("f16",), ("f32",), 512)
    return m.Welcome(1, 1, (), (offer,), m.Limits(1 << 20, 1 << 20, 1000, 64))


def events(session: Session) -> list[Any]:
    found = list(session.events)
    session.events.clear()
    return found


def sent(session: Session) -> list[Any]:
    found = list(session.outbox)
    session.outbox.clear()
    return found


def opened(committed: int = 0, window: int = 0) -> tuple[Session, Lane]:
    """A session whose lane 1 is aligned at `committed`."""
    session = Session("aa", Chain(LOG), TIMEOUTS, window=window)
    session.receive(welcome(), 0.0)
    lane = session.lane(1, 0)
    session.align(lane, 3, 0.0)
    (ask,) = sent(session)
    assert isinstance(ask, m.Open)
    session.receive(m.Opened(1, ask.epoch, committed, session.log.at(committed), "toy", "f16"), 0.1)
    assert events(session) == [Up(), Aligned(lane)]
    return session, lane


def rows(session: Session, lane: Lane, at: int, want: int = m.WANT_SAMPLE, end: int = 4) -> m.Rows:
    message = m.Rows(lane.alias, lane.epoch, at, session.log.at(at), session.log.tokens[at:end], None, want)
    session.rows(lane, message, 1.0)
    assert sent(session) == [message]
    return message


def result(session: Session, lane: Lane, at: int, tokens: list[int], committed: int) -> m.Result:
    return m.Result(lane.alias, lane.epoch, at, tokens, committed, session.log.at(committed))


def fault(lane: Lane, code: m.Code, position: int = 0, retry_ms: int = 0, epoch: int | None = None) -> m.Fault:
    return m.Fault(code, "no", "", retry_ms, lane.alias, lane.epoch if epoch is None else epoch, position)


def busy(session: Session, lane: Lane, start: float, end: float, problem: str = "all seats are taken") -> None:
    """The cloud says so every 250 ms in [start, end)."""
    while start < end:
        session.receive(m.Fault(m.Code.BUSY, problem, "", 250, lane.alias, lane.epoch, 0), start)
        start += 0.25


def asked() -> tuple[Session, Lane]:
    """A session that waits for the answer to the rows of its whole log since 1.0."""
    session, lane = opened()
    rows(session, lane, 0)
    return session, lane


def refusal(session: Session) -> IsthmusError:
    """The error of the only event."""
    (event,) = events(session)
    assert isinstance(event, Refused)
    return event.error


def test_rows_are_answered_once() -> None:
    session, lane = asked()
    answer = result(session, lane, 0, [9], 4)
    session.receive(answer, 1.1)
    session.receive(answer, 1.2)
    assert events(session) == [Answered(lane, 0, [9])]
    assert (lane.committed, session.wake_at, session.round_trips) == (4, float("inf"), 2)


def test_an_unanswered_message_is_repeated_ever_more_slowly() -> None:
    session, lane = opened()
    message = rows(session, lane, 0)
    at, waits = 1.0, []
    for _ in range(5):
        session.tick(session.wake_at - 0.001)
        assert sent(session) == []
        waits.append(session.wake_at - at)
        at = session.wake_at
        session.tick(at)
        assert sent(session) == [message]
    assert waits == pytest.approx([1, 2, 4, 8, 8])


def test_what_the_cloud_has_beyond_the_log_is_cut_off() -> None:
    session = Session("aa", Chain(LOG), TIMEOUTS)
    session.receive(welcome(), 0.0)
    lane = session.lane(1, 0)
    session.align(lane, 3, 0.0)
    session.receive(m.Opened(1, 1, 9, b"x" * 16, "toy", "f16"), 0.1)
    assert sent(session)[1:] == [m.Truncate(1, 2, 3)]
    session.receive(result(session, lane, 3, [], 3), 0.2)
    assert events(session)[-1] == Aligned(lane)


def test_another_log_is_cut_back_to_what_is_known_then_to_nothing() -> None:
    session, lane = opened(2)
    lane.opened = False
    session.align(lane, 3, 1.0)
    sent(session)
    session.receive(m.Opened(1, lane.epoch, 3, b"x" * 16, "toy", "f16"), 1.1)
    assert sent(session) == [m.Truncate(1, lane.epoch, 2)]
    session.receive(m.Result(1, lane.epoch, 2, [], 2, b"y" * 16), 1.2)
    assert sent(session) == [m.Truncate(1, lane.epoch, 0)]
    session.receive(m.Result(1, lane.epoch, 0, [], 0, ROOT), 1.3)
    assert events(session) == [Aligned(lane)]


def test_what_a_window_let_go_of_is_begun_anew() -> None:
    session, lane = opened(3, window=2)
    before = lane.session
    session.align(lane, 1, 1.0)
    closing, opening = sent(session)
    assert isinstance(closing, m.Close) and isinstance(opening, m.Open)
    assert opening.session == lane.session != before


def test_a_late_repetition_of_an_answer_to_truncate_is_no_answer_to_rows() -> None:
    session, lane = opened(3)
    session.align(lane, 2, 1.0)
    sent(session)
    late = result(session, lane, 2, [], 2)
    session.receive(late, 1.1)
    rows(session, lane, 2)
    session.receive(late, 1.2)
    assert events(session) == [Aligned(lane)]
    session.receive(result(session, lane, 2, [9], 4), 1.3)
    assert events(session) == [Answered(lane, 2, [9])]


@pytest.mark.parametrize("code", [m.Code.UNKNOWN_SESSION, m.Code.GAP, m.Code.DIVERGED, m.Code.STALE_EPOCH])
def test_a_lane_that_the_cloud_lost_is_opened_again_with_a_higher_epoch(code: m.Code) -> None:
    session, lane = asked()
    session.receive(fault(lane, code, epoch=lane.epoch - 1), 1.1)
    assert events(session) == []
    session.receive(fault(lane, code), 1.2)
    assert events(session) == [Behind(lane)]
    session.align(lane, 3, 1.3)
    (message,) = sent(session)
    assert isinstance(message, m.Open) and message.epoch == 2 and message.session == lane.session


def test_rows_that_overtook_others_are_only_sent_later() -> None:
    session, lane = opened()
    rows(session, lane, 0, m.WANT_NONE, 2)
    second = rows(session, lane, 2)
    session.receive(fault(lane, m.Code.GAP, 2), 1.1)
    session.receive(result(session, lane, 0, [], 2), 1.2)
    session.tick(1.36)
    assert (sent(session), events(session)) == ([second], [Answered(lane, 0, [])])


def test_a_busy_cloud_is_asked_again_when_it_said() -> None:
    session, lane = opened()
    message = rows(session, lane, 0)
    session.receive(fault(lane, m.Code.BUSY, 0, 4000), 1.1)
    session.tick(5.0)
    assert sent(session) == []
    session.tick(5.1)
    assert sent(session) == [message]


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (m.Code.KV_FULL, ConversationFullError),
        (m.Code.CLOSING, LinkError),
        (m.Code.ENGINE, ServiceError),
        (m.Code.UNKNOWN, ServiceError),
        (m.Code.UNSUPPORTED, ServiceError),
    ],
)
def test_other_refusals_are_errors(code: m.Code, kind: type[IsthmusError]) -> None:
    session, lane = asked()
    session.receive(fault(lane, code), 1.1)
    error = refusal(session)
    assert type(error) is kind and "no" in str(error) + "no"
    assert session.wake_at == float("inf")


def test_streamed_tokens_come_in_order_and_once() -> None:
    session, lane = opened()
    session.generate(lane, m.Generate(1, lane.epoch, 0, ROOT, LOG, 4), 1.0)
    news = [m.Tokens(1, lane.epoch, 4 + i, [20 + i], i == 3, "length" if i == 3 else "", 4 + i, ROOT) for i in range(4)]
    for index in (1, 0, 0, 3, 1):
        session.receive(news[index], 1.1)
    session.receive(m.Tokens(1, lane.epoch, 4, [20, 21, 22], False, "", 6, ROOT), 1.2)
    assert events(session) == [
        Streamed(lane, [20], False, ""),
        Streamed(lane, [21], False, ""),
        Streamed(lane, [22], False, ""),
        Streamed(lane, [23], True, "length"),
    ]
    assert session.wake_at == float("inf")


def test_a_new_connection_voids_what_is_under_way() -> None:
    session, lane = asked()
    session.receive(welcome(), 2.0)
    assert events(session) == [Up(), Behind(lane)]
    assert not lane.opened


def test_a_cloud_that_forgot_the_connection_is_greeted_again() -> None:
    session, lane = asked()
    session.receive(m.Fault(m.Code.VERSION, "there was no Hello"), 2.0)
    (hello,) = sent(session)
    assert isinstance(hello, m.Hello)
    session.receive(welcome(), 2.1)
    assert events(session) == [Up(), Behind(lane)]


def test_a_log_that_keeps_diverging_gets_a_fresh_session_and_in_the_end_an_error() -> None:
    session, lane = opened()
    names = {lane.session}
    for _ in range(100):
        session.align(lane, 3, 1.0)
        sent(session)
        session.receive(m.Opened(1, lane.epoch, 0, ROOT, "toy", "f16"), 1.1)
        rows(session, lane, 0)
        session.receive(fault(lane, m.Code.DIVERGED), 1.2)
        names.add(lane.session)
        found = events(session)
        if isinstance(found[-1], Refused):
            assert "come to agree" in str(found[-1].error)
            break
    else:
        pytest.fail("it goes on for ever")
    assert len(names) > 1


def test_patience_ends() -> None:
    session = Session("aa", Chain(LOG), TIMEOUTS, where="the cloud at X")
    session.greet(10.0)
    session.tick(14.9, False)
    assert events(session) == []
    session.tick(15.0, False)
    assert "the cloud at X does not answer" in str(refusal(session))

    session, _ = asked()
    session.tick(50.0, True)
    session.tick(52.9, False)
    assert events(session) == []
    session.tick(53.0, False)
    assert "went away" in str(refusal(session))

    session, _ = asked()
    session.tick(61.0, True)
    assert "gave no answer in 60 s; try again" in str(refusal(session))


def test_a_cloud_that_is_busy_to_the_end_says_with_what() -> None:
    session, lane = asked()
    busy(session, lane, 1.1, 61.0, "the cloud's KV is full")
    session.tick(61.0, True)
    assert "in 60 s: the cloud's KV is full; try again" in str(refusal(session))


def test_a_busy_cloud_is_waited_for_with_a_word_or_not_at_all() -> None:
    session, lane = asked()
    busy(session, lane, 1.1, 3.0)
    session.tick(3.0)
    assert session.patience.waiting == ""
    session.tick(3.2)
    assert session.patience.waiting == "the cloud is busy: waiting (all seats are taken)"
    busy(session, lane, 3.35, 7.0)
    session.tick(7.0)
    assert events(session) == []
    session.patience.impatient = True
    session.tick(7.1)
    error = refusal(session)
    assert isinstance(error, Busy) and "is busy: all seats are taken" in str(error)

    session, lane = asked()
    busy(session, lane, 1.1, 3.2)
    session.tick(3.2)
    assert session.patience.waiting
    session.receive(result(session, lane, 0, [9], 4), 3.3)
    assert session.patience.waiting == ""


def test_a_cloud_that_is_busy_no_more_and_computes_for_long_does_not_count_as_busy() -> None:
    session, lane = asked()
    session.patience.impatient = True
    busy(session, lane, 1.1, 3.2)
    session.tick(3.2)
    assert session.patience.waiting
    session.tick(4.0)
    assert session.patience.waiting
    session.tick(4.4)  # 250 ms until it was to be asked again, and retry_ms for its answer
    assert session.patience.waiting == ""
    for second in range(5, 30):
        session.tick(float(second))
        assert (session.patience.waiting, events(session)) == ("", [])
    busy(session, lane, 30.0, 34.9)  # counts from here
    session.tick(34.9)
    assert events(session) == []
    session.tick(35.0)
    assert isinstance(refusal(session), Busy)

    session, lane = asked()
    busy(session, lane, 1.1, 1.2)
    session.tick(61.0, True)
    assert "gave no answer in 60 s; try again" in str(refusal(session))


@pytest.mark.parametrize(("alias", "behind", "position"), [(1, 1, 0), (7, 0, 0), (1, 0, 3)])
def test_a_late_word_of_being_busy_is_passed_over(alias: int, behind: int, position: int) -> None:
    session, lane = asked()
    session.patience.impatient = True
    for tenth in range(11, 100):
        now = tenth / 10
        fault = m.Fault(m.Code.BUSY, "all seats are taken", "", 250, alias, lane.epoch - behind, position)
        session.receive(fault, now)
        session.tick(now)
    assert (session.patience.waiting, events(session)) == ("", [])


def test_who_gives_up_tells_the_cloud() -> None:
    session, lane = asked()
    session.tick(61.0, True)
    refusal(session)
    assert sent(session) == [m.Cancel(lane.alias, lane.epoch)]
    session.align(lane, 3, 62.0)
    (again,) = sent(session)
    assert isinstance(again, m.Open) and again.epoch > 1

    session = Session("aa", Chain(LOG), TIMEOUTS)
    session.receive(welcome(), 0.0)
    session.align(session.lane(1, 0), 3, 0.0)
    session.tick(60.0, True)
    assert not any(isinstance(message, m.Cancel) for message in sent(session))  # nothing is computed yet


def test_after_an_error_the_cloud_is_still_told_to_forget() -> None:
    session, lane = asked()
    session.receive(fault(lane, m.Code.KV_FULL), 1.1)
    session.close()
    assert sent(session) == [m.Cancel(lane.alias, lane.epoch), m.Close(lane.alias, lane.epoch)]


def test_a_refused_connection_and_a_stopping_cloud_end_it_sooner() -> None:
    session = Session("aa", Chain(LOG), TIMEOUTS)
    session.greet(10.0)
    session.tick(11.3, False, LinkError("nothing answers"))
    assert "nothing answers" in str(refusal(session))

    session, _ = asked()
    session.receive(m.Bye(100), 1.1)
    session.tick(2.1, False)
    assert "has stopped" in str(refusal(session))


def test_a_cloud_with_other_models() -> None:
    session = Session("aa", Chain(LOG), TIMEOUTS)
    session.receive(welcome("bb"), 0.0)
    assert "serves toy (bb) and not this bundle's model aa" in str(refusal(session))


def test_a_cloud_that_keeps_its_kv_otherwise_is_taken_as_it_is() -> None:
    session = Session("aa", Chain(LOG), TIMEOUTS)
    greeting = welcome()
    offer = msgspec.structs.replace(greeting.offers[0], kv_formats=("f32",))
    session.receive(msgspec.structs.replace(greeting, offers=(offer,)), 0.0)
    session.align(session.lane(1, 0), 3, 0.0)
    (ask,) = sent(session)
    assert ask.kv_format == "f32"


def test_timeouts_are_checked() -> None:
    with pytest.raises(DeviceError, match="retry_ms is 0"):
        Timeouts(retry_ms=0)


def test_a_cloud_of_long_steps_that_says_so_rarely_is_busy_all_the_same() -> None:
    session, lane = asked()
    session.patience.impatient = True
    now, notes = 1.0, set()
    while not (found := events(session)) and now < 20.0:
        now += 0.25
        if not now % 3:
            session.receive(fault(lane, m.Code.BUSY, retry_ms=250), now)
        session.tick(now)
        notes.add(session.patience.waiting)
    assert isinstance(found[0].error, Busy)
    assert now == 8.0 and len(notes) == 2  # none at first, then one


def test_a_setting_that_does_not_fit_the_cloud_is_not_called_a_full_conversation() -> None:
    session, lane = opened()
    rows(session, lane, 0)
    session.receive(fault(lane, m.Code.UNKNOWN_SESSION), 1.1)
    session.align(lane, 3, 1.2)
    session.receive(fault(lane, m.Code.KV_FULL), 1.3)
    assert events(session)[-1].error.problem == "no"


def test_a_slow_handshake_gets_more_patience_than_a_refusal() -> None:
    for failure, patience in ((LinkError("nothing answers"), 1.25), (SlowLinkError("too slow"), 5.0)):
        session = Session("aa", Chain(LOG), TIMEOUTS)
        session.greet(0.0)
        session.tick(patience - 0.01, False, failure)
        assert events(session) == []
        session.tick(patience, False, failure)
        assert events(session) == [Refused(failure)]


def test_tokens_of_an_earlier_stream_are_passed_over() -> None:
    session, lane = opened()
    session.generate(lane, m.Generate(1, lane.epoch, 0, ROOT, LOG, 2), 1.0)
    first = [m.Tokens(1, lane.epoch, 4 + i, [20 + i], i == 1, "length" if i else "", 4 + i, ROOT) for i in range(2)]
    for news in first:
        session.receive(news, 1.1)
    session.generate(lane, m.Generate(1, lane.epoch, 4, ROOT, [20, 21], 2), 1.2)
    events(session)
    session.receive(msgspec.structs.replace(first[1], committed=7), 1.3)  # told again from a log that went on
    session.receive(m.Tokens(1, lane.epoch, 4, [20, 21], True, "length", 7, ROOT), 1.3)
    assert events(session) == []
    session.receive(m.Tokens(1, lane.epoch, 6, [22], False, "", 6, ROOT), 1.4)
    assert events(session) == [Streamed(lane, [22], False, "")]


def test_a_stream_with_a_gap_is_asked_for_again_although_more_comes() -> None:
    session, lane = opened()
    request = m.Generate(1, lane.epoch, 0, ROOT, LOG, 50)
    session.generate(lane, request, 1.0)
    sent(session)
    for i in range(1, 9):
        session.receive(m.Tokens(1, lane.epoch, 4 + i, [20 + i], False, "", 4 + i, ROOT), 1.0 + i / 10)
    session.tick(2.0)
    assert (sent(session), events(session)) == ([request], [])
